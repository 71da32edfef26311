// Controls of the world: held keys, look and fields, drawn from the controller's schema.

import { byId, setText } from './dom.js';
import { Fields } from './fields.js';
import { HeldKeys } from './keyboard.js';
import { Look } from './look.js';
import { arrowsOf, read } from './schema.js';

const ALL_ARROWS = ['ArrowLeft', 'ArrowRight', 'ArrowUp', 'ArrowDown'];

/** Draws the controls and turns inputs into the `values` of `session.control`. */
export class Steering {
  /**
   * @param {{onValues: function(Object, number), onSet: function(Object)}} listener called with the values
   *     of a change and the time of its input, and with all values set in fields
   */
  constructor(listener) {
    this.listener = listener;
    const stage = byId('stage');
    this.keys = new HeldKeys(stage, byId('pads'), (keys, time) => this.change({ keys }, time));
    this.look = new Look(stage, (look, time) => this.change({ look }, time));
    this.fields = new Fields(byId('fields'), (name, value, time) => {
      this.change({ [name]: value }, time);
      listener.onSet(this.fields.set);
    });
    this.reading = read(null);
    this.drawn = '';
    stage.addEventListener('pointerdown', () => stage.focus({ preventScroll: true }));
    byId('sensitivity').addEventListener('input', ({ target }) => {
      this.look.sensitivity = Number(target.value);
      setText(byId('sensitivity-value'), Number(target.value).toFixed(1));
    });
  }

  /**
   * Draw a world's controls; unchanged parts are not redrawn.
   * @param {?Object} controls JSON Schema
   * @param {Object} [kept] values that were set before
   */
  draw(controls, kept = {}) {
    const drawn = JSON.stringify([controls, kept]);
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    this.reading = read(controls);
    const { keys, look, fields } = this.reading;
    this.keys.draw(keys, look);
    const taken = keys ? arrowsOf(keys.letters, look) : new Map();
    this.look.use(look, new Set(ALL_ARROWS.filter((arrow) => !taken.has(arrow))));
    this.fields.draw(fields, kept);
    byId('sensitivity-field').hidden = !look;
    byId('controls').hidden = !look && !fields.length;
    setText(byId('stage-help'), this.help(Boolean(keys?.letters.size), look));
  }

  help(keys, look) {
    const pointer = matchMedia('(hover: hover)').matches;
    if (!keys && !look) return '';
    if (!pointer) return look ? 'Hold the keys; drag the picture to look around.' : 'Hold the keys to steer.';
    const steer = keys ? 'Keys steer while the picture has a blue frame. ' : '';
    return look ? `${steer}Click the picture to look with the mouse, until Esc, or drag it.` : `${steer}Click it for the frame.`;
  }

  change(values, time) {
    const all = { keys: this.keys.held, look: [0, 0], ...this.fields.values };
    const required = this.reading.required.map((name) => [name, all[name]]);
    this.listener.onValues({ ...Object.fromEntries(required), ...values }, time);
  }

  /** Send the controller what is held and set, after a rewind or a resume. */
  repeat() {
    const values = { ...this.fields.set };
    if (this.reading.keys) values.keys = this.keys.held;
    if (Object.keys(values).length) this.change(values, null);
  }
}
