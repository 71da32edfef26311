// Held keys: from the keyboard while the stage has the focus, and from pads for touch.

import { element } from './dom.js';
import { arrowsOf } from './schema.js';

const PLACES = {
  w: [1, 2], a: [2, 1], s: [2, 2], d: [2, 3], q: [1, 1], e: [1, 3],
  i: [1, 2], j: [2, 1], k: [2, 2], l: [2, 3], u: [1, 1], o: [1, 3],
};
const CLUSTERS = ['wasdqe', 'ijkluo'];
const NAMES = { ' ': 'space' };

/** The held keys, from keyboard and pads. */
export class HeldKeys {
  /**
   * @param {HTMLElement} stage keys are taken only while it has the focus
   * @param {HTMLElement} pads where the pads are drawn
   * @param {function(string, number)} onChange called with the held letters and the time of the input
   */
  constructor(stage, pads, onChange) {
    this.pads = pads;
    this.onChange = onChange;
    this.holders = new Map(); // what holds a key -> its letter, in the order of pressing
    this.letters = new Map();
    stage.addEventListener('keydown', (event) => this.onKey(event, true));
    stage.addEventListener('keyup', (event) => this.onKey(event, false));
    stage.addEventListener('blur', () => this.release());
    window.addEventListener('blur', () => this.release());
    document.addEventListener('visibilitychange', () => document.hidden && this.release());
  }

  /**
   * Draw the pads of a world's keys.
   * @param {?{letters: Map<string, string>, most: number}} keys
   * @param {boolean} look
   */
  draw(keys, look) {
    this.release();
    this.letters = keys?.letters ?? new Map();
    this.most = keys?.most ?? Infinity;
    this.arrows = arrowsOf(this.letters, look);
    this.buttons = new Map();
    const rest = new Set(this.letters.keys());
    const groups = CLUSTERS.map((cluster) => [...cluster].filter((key) => rest.delete(key)));
    // Keys of one row of the keyboard are drawn side by side.
    const isPlaced = (group) => new Set(group.map((key) => PLACES[key][0])).size > 1;
    const drawn = groups.filter((group) => group.length);
    const nodes = drawn.map((group) => this.cluster(group, isPlaced(group)));
    if (rest.size) nodes.push(this.cluster([...rest], false));
    this.pads.replaceChildren(...nodes);
    this.pads.hidden = !nodes.length;
  }

  cluster(group, placed) {
    const pads = group.map((key) => this.pad(key, placed));
    return element('div', { class: placed ? 'cluster' : 'cluster row' }, ...pads);
  }

  pad(key, placed) {
    const what = this.letters.get(key);
    const holder = `pad ${key}`;
    const set = (down) => (event) => {
      if (event.type === 'pointerdown') {
        event.preventDefault();
        if (event.isTrusted) event.target.closest('button').setPointerCapture(event.pointerId);
      }
      this.set(holder, down ? key : null, event.timeStamp);
    };
    const pressed = (down) => (event) => {
      if (event.key !== ' ' && event.key !== 'Enter') return;
      event.preventDefault();
      if (!event.repeat) set(down)(event);
    };
    const name = NAMES[key] ?? key;
    const button = element(
      'button',
      {
        type: 'button', class: 'pad', 'aria-pressed': 'false',
        'aria-label': what ? `${name}: ${what}` : name,
        onpointerdown: set(true), onpointerup: set(false), onpointercancel: set(false),
        onlostpointercapture: set(false), onkeydown: pressed(true), onkeyup: pressed(false),
        onblur: set(false), oncontextmenu: (event) => event.preventDefault(),
      },
      element('kbd', {}, name),
      element('span', {}, what ?? ''),
    );
    if (placed) [button.style.gridRow, button.style.gridColumn] = PLACES[key];
    this.buttons.set(key, button);
    return button;
  }

  letterOf(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return null;
    if (this.arrows?.has(event.code)) return this.arrows.get(event.code);
    // Key positions count, so that the four movement keys are adjacent on any layout.
    const [, placed] = /^Key([A-Z])$/.exec(event.code) ?? [];
    const letter = placed ? placed.toLowerCase() : event.key;
    return this.letters.has(letter) ? letter : null;
  }

  onKey(event, down) {
    if (event.target !== event.currentTarget) return;
    const letter = this.letterOf(event);
    if (!down && this.holders.has(event.code)) this.set(event.code, null, event.timeStamp);
    if (!letter) return;
    event.preventDefault();
    if (down && !event.repeat) this.set(event.code, letter, event.timeStamp);
  }

  set(holder, letter, time) {
    if ((this.holders.get(holder) ?? null) === letter) return;
    const before = this.held;
    if (letter) this.holders.set(holder, letter);
    else this.holders.delete(holder);
    this.changed(before, time);
  }

  changed(before, time) {
    if (this.held === before) return;
    for (const [key, button] of this.buttons ?? []) {
      button.setAttribute('aria-pressed', String(this.held.includes(key)));
    }
    this.onChange(this.held, time);
  }

  /** Release all keys. */
  release() {
    const before = this.held;
    this.holders.clear();
    this.changed(before, performance.now());
  }

  /** @returns {string} the held letters, each once; the newest if the number is limited */
  get held() {
    const letters = [...new Set(this.holders.values())];
    return letters.slice(Math.max(0, letters.length - this.most)).sort().join('');
  }
}
