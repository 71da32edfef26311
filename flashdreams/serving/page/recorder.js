// Recording: the received fragments form one MP4 file; nothing is encoded here.

import { moved, parse } from './mp4.js';

/** Records from the next keyframe on. */
export class Recorder {
  constructor() {
    this.begin(16);
  }

  /**
   * A stream starts, or continues after a loss.
   * @param {number} fps
   */
  begin(fps) {
    this.fps = fps;
  }

  /** @returns {boolean} */
  get recording() {
    return Boolean(this.parts);
  }

  /** @returns {number} recorded seconds */
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
    if (!this.parts || !(meta.key || this.count)) return;
    this.first ??= this.header.bytes.slice();
    const ticks = Math.round(this.header.timescale / this.fps);
    this.parts.push(moved(fragment.bytes, this.count * ticks)); // from zero on, without gaps
    this.count += 1;
  }

  /** Start; the server must be asked for a keyframe. */
  start() {
    this.parts = [];
    this.count = 0;
    this.first = null;
  }

  /** @returns {?Blob} the file; null before the first frame */
  stop() {
    const file = this.count ? new Blob([this.first, ...this.parts], { type: 'video/mp4' }) : null;
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
