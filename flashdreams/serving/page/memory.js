// Session data that survives a reload: the token, the last frame, the set values.

const KEY = 'flashdreams-session';

/** A session that this tab can resume. */
export class Memory {
  /** @param {function(): number} lastFrame the last frame that was shown */
  constructor(lastFrame) {
    this.lastFrame = lastFrame;
    this.session = null;
    addEventListener('pagehide', () => this.store());
  }

  /** Restore what an earlier page of this tab stored. */
  async load() {
    try {
      this.session = JSON.parse(sessionStorage.getItem(KEY));
    } catch {
      this.session = null;
    }
    if (this.session && !(await this.own())) this.session = null;
  }

  /** A duplicated tab also has the token; only one of them may use it. */
  own() {
    if (!navigator.locks) return Promise.resolve(true);
    const name = `flashdreams ${this.session.token}`;
    return new Promise((resolve) => {
      navigator.locks.request(name, { ifAvailable: true }, (lock) => {
        resolve(Boolean(lock));
        // Held while the page exists, or until the session is dropped.
        return lock && new Promise((free) => (this.free = free));
      });
    });
  }

  /**
   * A session began.
   * @param {string} token
   */
  async remember(token) {
    if (this.session?.token === token) return;
    this.forget();
    this.session = { token, frame: -1, values: {} };
    this.store();
    await this.own();
  }

  /** The session is over. */
  forget() {
    this.session = null;
    this.free?.();
    this.free = null;
    sessionStorage.removeItem(KEY);
  }

  /** @param {Object} values that were set in the fields */
  keep(values) {
    if (!this.session) return;
    this.session.values = values;
    this.store();
  }

  /** @returns {number} the first frame that was not shown */
  get fromFrame() {
    const last = this.lastFrame();
    return (last >= 0 ? last : (this.session?.frame ?? -1)) + 1;
  }

  store() {
    if (!this.session) return;
    this.session.frame = this.fromFrame - 1;
    sessionStorage.setItem(KEY, JSON.stringify(this.session));
  }
}
