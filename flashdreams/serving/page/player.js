// The way in which this browser shows the stream, with fallbacks.

import { FilmPlayer } from './film.js';
import { CodecPlayer, JpegPlayer } from './pictures.js';

/** One of the ways to show video, behind a common interface. */
export class Player {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {HTMLVideoElement} video
   * @param {Object} listener `onShown(frame, time)`, `onDropped(count)` and
   *     `onChange(format, reason)`: the stream must restart in that format
   */
  constructor(canvas, video, listener) {
    this.canvas = canvas;
    this.video = video;
    this.listener = listener;
    this.ways = [];
    this.player = null;
  }

  /**
   * Detect what this browser supports.
   * @param {?string} wanted "webcodecs", "mse" or "jpeg"; null for the best
   */
  async prepare(wanted) {
    const ways = [];
    if (await CodecPlayer.supported()) ways.push('webcodecs');
    if (FilmPlayer.supported()) ways.push('mse');
    ways.push('jpeg');
    this.ways = ways.includes(wanted) ? ways.slice(ways.indexOf(wanted)) : ways;
    this.use(this.ways[0]);
  }

  use(way) {
    this.player?.stop();
    this.way = way;
    const listener = {
      ...this.listener,
      onFailure: (text) => this.way === way && this.fallBack(text),
    };
    const isFilm = way === 'mse';
    this.canvas.hidden = isFilm;
    this.video.hidden = !isFilm;
    if (isFilm) this.player = new FilmPlayer(this.video, listener);
    else this.player = new (way === 'jpeg' ? JpegPlayer : CodecPlayer)(this.canvas, listener);
  }

  /** The server sends JPEG frames only. @returns {boolean} whether that is a change */
  useJpeg() {
    const isChange = this.way !== 'jpeg';
    if (isChange) this.use('jpeg');
    return isChange;
  }

  fallBack(reason) {
    const next = this.ways[this.ways.indexOf(this.way) + 1];
    if (!next) return;
    this.use(next);
    this.listener.onChange(this.player.format, reason);
  }

  /** @returns {"m4s"|"jpeg"} to request from the server */
  get format() {
    return this.player.format;
  }

  /** @returns {number} frames that have arrived but are not yet shown */
  get waiting() {
    return this.player.waiting;
  }

  /**
   * A stream begins.
   * @param {{codec: ?string, fps: number}} stream
   */
  begin(stream) {
    this.player.begin(stream);
  }

  /**
   * A binary message.
   * @param {Object} meta its `video.chunk_metadata`
   * @param {ArrayBuffer} buffer
   */
  push(meta, buffer) {
    try {
      this.player.push(meta, buffer);
    } catch (error) {
      this.fallBack(error.message);
    }
  }

  /**
   * Show a frame as soon as it is decoded, because it responds to a key.
   * @param {number} frame
   */
  hurry(frame) {
    this.player.hurry(frame);
  }

  /** Drop what is not yet shown. */
  clear() {
    this.player.clear();
  }
}
