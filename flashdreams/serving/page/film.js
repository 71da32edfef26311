// Video through Media Source Extensions, for browsers or addresses without WebCodecs.

import { parse } from './mp4.js';

const KEPT_S = 10;

/** Appends the fragments to a <video> element and keeps it near the newest frame. */
export class FilmPlayer {
  /** @returns {boolean} whether this browser plays H.264 fragments */
  static supported() {
    const Source = window.ManagedMediaSource ?? window.MediaSource;
    return Boolean(Source?.isTypeSupported('video/mp4; codecs="avc1.42c01f"'));
  }

  /**
   * @param {HTMLVideoElement} video
   * @param {Object} listener of `Playout`, and `onFailure(text)`
   */
  constructor(video, listener) {
    this.video = video;
    this.listener = listener;
    this.format = 'm4s';
    this.frames = [];
    this.onRendered = this.onRendered.bind(this);
    video.addEventListener('error', () => {
      if (this.running) listener.onFailure(video.error?.message || 'the video cannot be decoded');
    });
  }

  begin({ codec, fps }) {
    this.running = true;
    this.fps = fps;
    this.epoch = 0;
    this.seekTo = undefined;
    this.pending = [];
    this.frames = [];
    this.shown = -1;
    const Source = window.ManagedMediaSource ?? window.MediaSource;
    const source = new Source();
    this.source = source;
    this.buffer = null;
    this.video.disableRemotePlayback = true; // a managed source asks for it
    if (this.url) URL.revokeObjectURL(this.url);
    this.url = URL.createObjectURL(source);
    this.video.src = this.url;
    source.addEventListener('sourceopen', () => {
      if (this.source !== source) return;
      this.buffer = source.addSourceBuffer(`video/mp4; codecs="${codec}"`);
      this.buffer.addEventListener('updateend', () => this.append());
      this.append();
    });
    this.video.requestVideoFrameCallback?.(this.onRendered);
  }

  push(meta, buffer) {
    const { header, fragment } = parse(buffer);
    if (header) this.timescale = header.timescale;
    const time = fragment.time / (this.timescale || 1000);
    if (meta.epoch > this.epoch) {
      this.epoch = meta.epoch;
      this.seekTo = time;
    }
    this.frames.push({ time, frame: meta.first_frame });
    if (this.frames.length > 1000) this.frames.splice(0, 500);
    this.pending.push(buffer);
    this.append();
  }

  append() {
    const { buffer, video } = this;
    if (!buffer || buffer.updating || this.source.readyState !== 'open') return;
    this.follow();
    const start = buffer.buffered.length ? buffer.buffered.start(0) : 0;
    if (video.currentTime - start > 2 * KEPT_S) {
      buffer.remove(start, video.currentTime - KEPT_S);
      return;
    }
    if (!this.pending.length) return;
    try {
      buffer.appendBuffer(this.pending.shift()); // goes on at the end of the update
    } catch (error) {
      this.listener.onFailure(error.message);
    }
  }

  /** Play at most a few frames behind the newest. */
  follow() {
    const { video, buffer } = this;
    const count = buffer.buffered.length;
    if (!count) return;
    const end = buffer.buffered.end(count - 1);
    const start = buffer.buffered.start(count - 1);
    if (this.seekTo !== undefined && this.seekTo < end) {
      video.currentTime = this.seekTo;
      this.seekTo = undefined;
    }
    const behind = end - video.currentTime;
    if (video.currentTime < start || behind > 0.6 + 4 / this.fps) {
      video.currentTime = Math.max(start, end - 1.5 / this.fps);
    }
    video.playbackRate = behind > 0.05 + 2 / this.fps ? 1.15 : 1;
    if (video.paused) video.play().catch(() => {});
  }

  onRendered(now, { mediaTime, expectedDisplayTime }) {
    if (!this.running) return;
    this.video.requestVideoFrameCallback(this.onRendered);
    let frame = null;
    for (const item of this.frames) if (item.time <= mediaTime + 0.5 / this.fps) frame = item.frame;
    if (frame === null || frame <= this.shown) return;
    if (this.shown >= 0 && frame > this.shown + 1) {
      this.listener.onDropped(frame - this.shown - 1);
    }
    this.shown = frame;
    this.listener.onShown(frame, expectedDisplayTime);
  }

  get waiting() {
    const end = this.frames.at(-1)?.frame ?? 0;
    return Math.max(0, end - Math.max(this.shown, 0));
  }

  clear() {}

  hurry() {} // the element has a buffer of its own; `follow` keeps it short

  stop() {
    this.running = false;
    this.video.pause();
  }
}
