// Timing of decoded frames: at the frame rate of the video, as early as the network jitter allows.

import { percentile } from './receipts.js';

const MAX_LEAD_MS = 250;
const LATE_SHARE = 0.2;
const FIRST_WINDOW_MS = 250;
const WINDOW_MS = 1000;

/**
 * Shows decoded frames on a canvas.
 *
 * Each frame is due one frame period after the previous one; one that is decoded late is shown at
 * once. Every second (at the beginning, sooner) the clock is adjusted so that one frame in five would
 * have been late. So the delay follows the jitter without waiting for rare peaks, and a steady
 * stream is shown as it arrives. A stream that is a whole frame late adjusts the clock at once.
 */
export class Playout {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {{onShown: function(number, number), onDropped: function(number)}} listener called with the
   *     frame and the time at which it was on the screen, and with numbers of dropped frames
   */
  constructor(canvas, listener) {
    this.canvas = canvas;
    this.context = canvas.getContext('2d', { alpha: false });
    this.listener = listener;
    this.queue = [];
    this.drawn = null;
    this.last = null;
    this.tick = this.tick.bind(this);
    this.observer = new ResizeObserver(() => this.redraw());
    this.observer.observe(canvas);
  }

  /**
   * Start with an empty queue.
   * @param {number} fps
   */
  begin(fps) {
    this.clear();
    this.period = 1000 / fps;
    this.anchor = null;
    this.urgent = null;
    this.leads = [];
    this.span = FIRST_WINDOW_MS;
    if (!this.running) {
      this.running = true;
      requestAnimationFrame(this.tick);
    }
  }

  /** Close all queued frames. */
  clear() {
    for (const item of this.queue) item.picture.close();
    this.listener.onDropped(this.queue.length);
    this.queue = [];
  }

  /** Stop; the last frame stays on the canvas. */
  stop() {
    this.running = false;
    this.clear();
  }

  /**
   * A frame responds to a key: it is shown as soon as it is decoded, and nothing older after it.
   * @param {number} frame
   */
  hurry(frame) {
    this.urgent = frame;
  }

  /** @returns {number} decoded frames that are not due yet */
  get waiting() {
    return this.queue.length;
  }

  /**
   * Add a decoded frame.
   * @param {VideoFrame|ImageBitmap} picture closed here once it is no longer needed
   * @param {number} frame its number in the session's video
   */
  push(picture, frame) {
    const now = performance.now();
    if (this.urgent !== null && frame >= this.urgent) {
      this.urgent = null;
      this.clear();
      this.anchor = null;
    }
    if (!this.anchor || Math.abs(this.due(frame) - now) > 1000) this.anchor = { frame, time: now };
    const lead = this.due(frame) - now;
    const isFar = lead < -this.period || lead > MAX_LEAD_MS;
    if (isFar) this.anchor.time -= lead;
    this.adapt(isFar ? 0 : lead, now);
    this.queue.push({ picture, frame });
    if (this.queue.length > 2 + MAX_LEAD_MS / this.period) this.dropFirst();
  }

  due(frame) {
    return this.anchor.time + (frame - this.anchor.frame) * this.period;
  }

  adapt(lead, now) {
    this.leads.push({ lead, now });
    if (now - this.leads[0].now < this.span) return;
    this.anchor.time -= percentile(this.leads.map((item) => item.lead), LATE_SHARE);
    this.leads = [];
    this.span = Math.min(WINDOW_MS, 2 * this.span);
  }

  dropFirst() {
    this.queue.shift().picture.close();
    this.listener.onDropped(1);
  }

  tick(now) {
    if (!this.running) return;
    // A frame drawn in the last animation frame is on the screen in this one.
    if (this.drawn !== null) this.listener.onShown(this.drawn, now);
    this.drawn = null;
    const limit = now + 8; // half a frame of a 60 Hz screen: the nearer of two refreshes
    while (this.queue.length > 1 && this.due(this.queue[1].frame) <= limit) this.dropFirst();
    if (this.queue.length && this.due(this.queue[0].frame) <= limit) {
      const { picture, frame } = this.queue.shift();
      this.draw(picture);
      this.drawn = frame;
    }
    requestAnimationFrame(this.tick);
  }

  draw(picture) {
    const width = picture.displayWidth ?? picture.width;
    const height = picture.displayHeight ?? picture.height;
    // Small videos are enlarged here, with a better filter than CSS; large ones
    // are drawn unscaled and fitted by the browser.
    const box = this.canvas.clientWidth * devicePixelRatio;
    const scale = Math.max(1, Math.min(box, 1600) / width);
    const size = [Math.round(width * scale), Math.round(height * scale)];
    if (this.canvas.width !== size[0] || this.canvas.height !== size[1]) {
      [this.canvas.width, this.canvas.height] = size;
    }
    this.context.imageSmoothingEnabled = true;
    this.context.imageSmoothingQuality = 'high';
    this.context.drawImage(picture, 0, 0, ...size);
    if (this.last !== picture) this.last?.close();
    this.last = picture;
  }

  redraw() {
    if (this.last) this.draw(this.last);
  }
}
