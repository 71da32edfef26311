// Recording: the fragments that arrive are one MP4 file; nothing is encoded here.

import { moved, parse } from './mp4.js';

const MOST_BYTES_BEFORE = 64 * 2 ** 20;

/** Keeps the fragments since the last key picture, and while it records all of them. */
export class Recorder {
  constructor() {
    this.begin(16);
  }

  /**
   * A stream begins, or goes on after a loss.
   * @param {number} fps
   */
  begin(fps) {
    this.fps = fps;
    this.before = [];
    this.beforeBytes = 0;
  }

  /** @returns {boolean} */
  get recording() {
    return Boolean(this.parts);
  }

  /** @returns {number} seconds that were recorded */
  get seconds() {
    return this.parts ? this.count / this.fps : 0;
  }

  /**
   * A binary message of the format "m4s".
   * @param {Object} meta
   * @param {ArrayBuffer} buffer
   */
  push(meta, buffer) {
    const { header, fragment } = parse(buffer);
    if (header) this.header = header;
    if (meta.key) this.begin(this.fps);
    if (meta.key || this.before.length) {
      this.before.push(fragment.bytes);
      this.beforeBytes += fragment.bytes.length;
      if (this.beforeBytes > MOST_BYTES_BEFORE) this.begin(this.fps);
    }
    if (this.parts) this.add(fragment.bytes);
  }

  add(bytes) {
    const ticks = Math.round(this.header.timescale / this.fps);
    this.parts.push(moved(bytes, this.count * ticks)); // the file begins at zero, without gaps
    this.count += 1;
  }

  /** Begin with the last key picture. @returns {boolean} false: there was none yet */
  start() {
    if (!this.header || !this.before.length) return false;
    this.parts = [];
    this.count = 0;
    this.first = this.header.bytes.slice();
    for (const bytes of this.before) this.add(bytes);
    return true;
  }

  /** @returns {Blob} the file */
  stop() {
    const file = new Blob([this.first, ...this.parts], { type: 'video/mp4' });
    this.parts = null;
    return file;
  }
}

/**
 * Offer a file for download.
 * @param {Blob} file
 * @param {string} name
 */
export function download(file, name) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(file);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
