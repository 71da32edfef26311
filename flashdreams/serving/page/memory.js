// What a page remembers of its session over a reload: the token, the last picture, what was set.

const KEY = 'flashdreams-session';

/** A session that this tab can take up again. */
export class Memory {
  /** @param {function(): number} lastFrame the last picture that was shown */
  constructor(lastFrame) {
    this.lastFrame = lastFrame;
    this.session = null;
    addEventListener('pagehide', () => this.store());
  }

  /** Take up what an earlier page of this tab left. */
  async load() {
    try {
      this.session = JSON.parse(sessionStorage.getItem(KEY));
    } catch {
      this.session = null;
    }
    if (this.session && !(await this.own())) this.session = null;
  }

  /** A tab that was duplicated has the token, too; only one of them may use it. */
  own() {
    if (!navigator.locks) return Promise.resolve(true);
    const name = `flashdreams ${this.session.token}`;
    return new Promise((resolve) => {
      navigator.locks.request(name, { ifAvailable: true }, (lock) => {
        resolve(Boolean(lock));
        // Held for as long as the page lives, or until the session is forgotten.
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

  /** @returns {number} the first picture that was not shown */
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
