// Receipts of shown frames for the server, latency percentiles for the page.

const EVERY_MS = 250;
const KEPT = 500;

/**
 * A percentile.
 * @param {number[]} values
 * @param {number} share from 0 to 1
 * @returns {?number} null without values
 */
export function percentile(values, share) {
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.ceil(share * sorted.length) - 1)];
}

/**
 * Tracks events from the input to the screen.
 *
 * Key to photon is the time from the browser's time stamp of an input event to the animation frame
 * after the one that drew the first frame of the chunk in which the event acts.
 */
export class Receipts {
  /** @param {function(Object)} send sends a message to the server */
  constructor(send) {
    this.send = send;
    this.latencies = [];
    this.begin();
    setInterval(() => this.flush(), EVERY_MS);
  }

  /** A new session: nothing has been shown yet. */
  begin() {
    this.lastFrame = -1;
    this.reported = -1;
    this.sent = new Map();
    this.awaited = [];
    this.unreported = [];
    this.dropped = 0;
    this.times = [];
  }

  /**
   * The session continues after a loss, maybe with earlier frames.
   * @param {number} frame the first one that follows
   */
  resume(frame) {
    this.lastFrame = frame - 1;
    this.awaited = [];
  }

  /**
   * An event was sent.
   * @param {string} id
   * @param {number} time of the input, as `event.timeStamp`
   */
  onSent(id, time) {
    this.sent.set(id, time);
    if (this.sent.size > KEPT) this.sent.delete(this.sent.keys().next().value);
  }

  /**
   * The server reports from which frame on events act.
   * @param {{event_ids: string[], first_frame: number}} message
   */
  onApplied(message) {
    for (const id of message.event_ids) {
      const time = this.sent.get(id);
      if (time !== undefined) this.awaited.push({ time, frame: message.first_frame });
      this.sent.delete(id);
    }
  }

  /**
   * A frame is on the screen.
   * @param {number} frame
   * @param {number} time
   */
  onShown(frame, time) {
    this.lastFrame = Math.max(this.lastFrame, frame);
    this.times.push(time);
    if (this.times.length > 240) this.times.shift();
    const answered = this.awaited.filter((item) => item.frame <= frame);
    if (!answered.length) return;
    this.awaited = this.awaited.filter((item) => item.frame > frame);
    for (const item of answered) {
      const ms = Math.max(0, time - item.time);
      this.unreported.push(ms);
      this.latencies.push(ms);
    }
    if (this.latencies.length > KEPT) this.latencies.splice(0, this.latencies.length - KEPT);
  }

  /**
   * A frame arrived while the page was hidden: it gets a receipt, but no latency.
   * @param {number} frame
   */
  onUnseen(frame) {
    this.lastFrame = Math.max(this.lastFrame, frame);
    this.awaited = this.awaited.filter((item) => item.frame > frame);
  }

  /** @param {number} count frames were dropped */
  onDropped(count) {
    this.dropped += count;
  }

  /** @returns {number} frames shown per second, over the last two seconds */
  get fps() {
    const recent = this.times.filter((time) => time > performance.now() - 2000);
    if (recent.length < 2) return 0;
    return ((recent.length - 1) * 1000) / (recent.at(-1) - recent[0]);
  }

  /** Report to the server, if there is anything new. */
  flush() {
    if (this.lastFrame < 0) return;
    if (this.lastFrame === this.reported && !this.dropped && !this.unreported.length) return;
    const told = this.send({
      type: 'session.shown',
      frame: this.lastFrame,
      key_to_photon_ms: this.unreported.slice(0, 64),
      dropped: this.dropped,
    });
    if (!told) return;
    this.reported = this.lastFrame;
    this.unreported.splice(0, 64);
    this.dropped = 0;
  }
}
