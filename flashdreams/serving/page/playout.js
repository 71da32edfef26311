// When a decoded picture is shown: at the video's own pace, as early as the network's jitter allows.

const MAX_LEAD_MS = 250;
const SLACK_MS = 4;
const FIRST_WINDOW_MS = 250;
const WINDOW_MS = 2000;

/**
 * Shows decoded pictures on a canvas.
 *
 * Each picture is due one frame period after the one before. One that is decoded late is shown at
 * once and moves the clock back; when all pictures of two seconds were early (at the beginning, of
 * less), the clock moves forward by what the latest of them had in hand. So the delay follows the
 * jitter of the last seconds, and a steady stream is shown as it comes.
 */
export class Playout {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {{onShown: function(number, number), onDropped: function(number)}} listener told the
   *     frame and the time at which it was on the screen, and numbers of pictures that were left out
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
   * Begin with an empty queue.
   * @param {number} fps
   */
  begin(fps) {
    this.clear();
    this.period = 1000 / fps;
    this.anchor = null;
    this.leads = [];
    this.span = FIRST_WINDOW_MS;
    if (!this.running) {
      this.running = true;
      requestAnimationFrame(this.tick);
    }
  }

  /** Close all pictures that wait. */
  clear() {
    for (const item of this.queue) item.picture.close();
    this.listener.onDropped(this.queue.length);
    this.queue = [];
  }

  /** End; the last picture stays on the canvas. */
  stop() {
    this.running = false;
    this.clear();
  }

  /** @returns {number} decoded pictures that wait for their time */
  get waiting() {
    return this.queue.length;
  }

  /**
   * Hand over a decoded picture.
   * @param {VideoFrame|ImageBitmap} picture closed here once it is no longer needed
   * @param {number} frame its number in the session's video
   */
  push(picture, frame) {
    const now = performance.now();
    if (!this.anchor || Math.abs(this.due(frame) - now) > 1000) this.anchor = { frame, time: now };
    const lead = this.due(frame) - now;
    if (lead < 0 || lead > MAX_LEAD_MS) this.anchor.time -= lead;
    this.adapt(Math.max(lead, 0), now);
    this.queue.push({ picture, frame });
    if (this.queue.length > 2 + MAX_LEAD_MS / this.period) this.dropFirst();
  }

  due(frame) {
    return this.anchor.time + (frame - this.anchor.frame) * this.period;
  }

  adapt(lead, now) {
    this.leads.push({ lead, now });
    if (now - this.leads[0].now < this.span) return;
    const inHand = Math.min(...this.leads.map((item) => item.lead)) - SLACK_MS;
    if (inHand > 0) this.anchor.time -= inHand;
    this.leads = [];
    this.span = Math.min(WINDOW_MS, 2 * this.span);
  }

  dropFirst() {
    this.queue.shift().picture.close();
    this.listener.onDropped(1);
  }

  tick(now) {
    if (!this.running) return;
    // What was drawn in the last animation frame is on the screen by this one.
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
    // Small worlds are enlarged here, with a better filter than that of a style sheet; large ones
    // are drawn as they are and fitted by the browser.
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
