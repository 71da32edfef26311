// The socket of a session: waits until the server is ready, resumes after a loss, reports its state.

const PING_MS = 15_000;
const SILENT_MS = 25_000;
const MAX_WAIT_S = 10;
const FINAL = new Set(['unauthorized', 'not_allowed', 'bad_message', 'session_failed']);

/**
 * A session's connection, which reconnects automatically.
 *
 * `listener.onState(state, detail)` is called with: "loading" (the server's own words), "connecting",
 * "queued" (position), "live", "reconnecting" (seconds), "ended" (the reason).
 */
export class Connection {
  /**
   * @param {Object} listener `onState`, `onMessage(message)`, `onMedia(meta, buffer)` and
   *     `opening()`, which returns the first message, for a new or a resumed session
   */
  constructor(listener) {
    this.listener = listener;
    this.socket = null;
    this.losses = 0;
    setInterval(() => this.keepAlive(), PING_MS);
  }

  /** Connect, or connect again. */
  async open() {
    const attempt = {};
    this.attempt = attempt;
    this.drop();
    this.over = false;
    if (!(await this.ready(attempt))) return;
    this.listener.onState('connecting');
    const address = new URL('v1/realtime/video', location.href);
    address.protocol = address.protocol.replace('http', 'ws');
    address.hash = '';
    const socket = new WebSocket(address);
    socket.binaryType = 'arraybuffer';
    this.socket = socket;
    this.meta = null;
    this.heard = performance.now();
    socket.onopen = () => this.send(this.listener.opening());
    socket.onmessage = ({ data }) => this.socket === socket && this.receive(data);
    socket.onclose = () => this.socket === socket && this.lost();
  }

  /** Wait until the server is ready. @returns {Promise<boolean>} false: superseded */
  async ready(attempt) {
    for (;;) {
      let wait = 1;
      try {
        const reply = await fetch('readyz', { cache: 'no-store' });
        if (this.attempt !== attempt) return false;
        if (reply.ok) return true;
        this.listener.onState('loading', await bodyOf(reply));
      } catch {
        if (this.attempt !== attempt) return false;
        wait = this.nextWait();
        this.listener.onState('reconnecting', wait);
      }
      await new Promise((resolve) => setTimeout(resolve, wait * 1000));
      if (this.attempt !== attempt) return false;
    }
  }

  nextWait() {
    const wait = Math.min(MAX_WAIT_S, 0.5 * 2 ** this.losses);
    this.losses += 1;
    return wait * (0.75 + 0.5 * Math.random());
  }

  receive(data) {
    this.heard = performance.now();
    if (typeof data !== 'string') {
      if (this.meta) this.listener.onMedia(this.meta, data);
      this.meta = null;
      return;
    }
    const message = JSON.parse(data);
    if (message.type === 'video.chunk_metadata') this.meta = message;
    else if (message.type === 'video.queued') this.listener.onState('queued', message.position);
    else if (message.type === 'video.start') {
      this.losses = 0;
      this.started = true;
      this.listener.onMessage(message);
      this.listener.onState('live');
    } else {
      if (message.type === 'error') this.failed(message);
      this.listener.onMessage(message);
      if (message.type === 'session.done') this.end(message.stopped ? 'stopped' : 'done');
    }
  }

  /** An error before the session has started, or one of the session itself, ends it. */
  failed(message) {
    const isTaken = message.code === 'unknown_session' && this.started;
    if (isTaken) this.end(explained(message));
    if (message.code === 'queue_full') this.losses = Math.max(this.losses, 4);
    const isFinal = message.code === 'session_failed' || !this.started;
    if (FINAL.has(message.code) && isFinal) this.end(explained(message));
  }

  /** End the session, or the attempts to start one. */
  stop() {
    if (!this.started || !this.send({ type: 'session.stop' })) this.end('stopped');
  }

  end(reason) {
    this.attempt = null;
    this.over = true;
    this.listener.onState('ended', reason);
    this.drop();
  }

  lost() {
    this.socket = null;
    this.started = false;
    if (this.over) return;
    const attempt = {};
    this.attempt = attempt;
    const wait = this.nextWait();
    this.listener.onState('reconnecting', wait);
    setTimeout(() => this.attempt === attempt && this.open(), wait * 1000);
  }

  keepAlive() {
    if (!this.socket) return;
    if (performance.now() - this.heard > SILENT_MS) {
      this.drop();
      this.lost();
    } else this.send({ type: 'session.ping' });
  }

  /**
   * Send a message.
   * @param {Object} message
   * @returns {boolean} false without a connection
   */
  send(message) {
    if (this.socket?.readyState !== WebSocket.OPEN) return false;
    this.socket.send(JSON.stringify(message));
    return true;
  }

  drop() {
    const socket = this.socket;
    this.socket = null;
    this.started = false;
    socket?.close();
  }
}

/**
 * The text of an error, with the allowed values.
 * @param {{message: string, allowed: *}} error
 * @returns {string}
 */
export function explained({ message, allowed }) {
  return allowed ? `${message} Allowed: ${inWords(allowed)}.` : message;
}

function inWords(value) {
  if (Array.isArray(value)) return value.join(', ');
  if (typeof value !== 'object') return String(value);
  return Object.entries(value).map(([key, item]) => `${key}: ${inWords(item)}`).join('; ');
}

/**
 * The body of an unsuccessful reply.
 * @param {Response} reply
 * @returns {Promise<Object>} empty if it is not a JSON object
 */
export async function bodyOf(reply) {
  try {
    return Object(await reply.json());
  } catch {
    return {};
  }
}
