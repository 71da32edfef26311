// Sliders, switches, choices and text boxes for the other inputs of a controller.

import { element } from './dom.js';

/** The fields of a controller; each change is reported at once. */
export class Fields {
  /**
   * @param {HTMLElement} place
   * @param {function(string, *, number)} onChange called with a name, a value and the time of the input
   */
  constructor(place, onChange) {
    this.place = place;
    this.onChange = onChange;
    this.values = {};
    this.changed = new Set();
  }

  /**
   * Draw them.
   * @param {import('./schema.js').Field[]} fields
   * @param {Object} kept values that were set before
   */
  draw(fields, kept = {}) {
    this.values = {};
    this.changed = new Set();
    this.place.replaceChildren(
      ...fields.map((field) => {
        const isKept = field.name in kept;
        this.values[field.name] = isKept ? kept[field.name] : field.initial;
        if (isKept) this.changed.add(field.name);
        return this[field.kind](field, this.values[field.name]);
      }),
    );
  }

  /** @returns {Object} the values that the user has set */
  get set() {
    return Object.fromEntries([...this.changed].map((name) => [name, this.values[name]]));
  }

  change(field, value, event) {
    if (this.values[field.name] === value) return;
    this.values[field.name] = value;
    this.changed.add(field.name);
    this.onChange(field.name, value, event.timeStamp);
  }

  frame(field, input, beside = null) {
    const id = `field-${field.name}`;
    input.id = id;
    const help = field.description ? element('p', { class: 'help', id: `${id}-help` }) : null;
    if (help) {
      help.textContent = field.description;
      input.setAttribute('aria-describedby', help.id);
    }
    const label = element('label', { for: id }, field.title);
    return element(
      'div',
      { class: `field ${field.kind}` },
      element('div', { class: 'field-head' }, label, beside),
      field.kind === 'switch' ? null : input,
      help,
    );
  }

  slider(field, value) {
    const { minimum, maximum, type, multipleOf } = field.schema;
    const bounded = minimum !== undefined && maximum !== undefined;
    const step = type === 'integer' ? 1 : (multipleOf ?? (bounded ? (maximum - minimum) / 200 : 'any'));
    const shown = (number) => String(Math.round(number * 1000) / 1000);
    if (!bounded) {
      const input = element('input', { type: 'number', step, value });
      if (minimum !== undefined) input.min = minimum;
      if (maximum !== undefined) input.max = maximum;
      input.addEventListener('change', (event) => {
        if (input.value !== '' && input.checkValidity()) this.change(field, Number(input.value), event);
        else input.reportValidity();
      });
      return this.frame(field, input);
    }
    const output = element('output', { for: `field-${field.name}` }, shown(value));
    const input = element('input', { type: 'range', min: minimum, max: maximum, step });
    input.value = value;
    input.addEventListener('input', (event) => {
      output.textContent = shown(Number(input.value));
      this.change(field, Number(input.value), event);
    });
    return this.frame(field, input, output);
  }

  switch(field, value) {
    const input = element('input', { type: 'checkbox', role: 'switch', checked: value });
    input.addEventListener('change', (event) => this.change(field, input.checked, event));
    return this.frame(field, input, input);
  }

  choice(field, value) {
    const options = field.schema.enum.map((item, at) =>
      element('option', { value: String(at), selected: item === value }, String(item)),
    );
    const input = element('select', {}, ...options);
    input.addEventListener('change', (event) =>
      this.change(field, field.schema.enum[Number(input.value)], event),
    );
    return this.frame(field, input);
  }

  text(field, value) {
    const input = element('input', { type: 'text', value, autocomplete: 'off' });
    if (field.schema.maxLength) input.maxLength = field.schema.maxLength;
    if (field.schema.pattern) input.pattern = field.schema.pattern;
    input.addEventListener('change', (event) => {
      if (input.checkValidity()) this.change(field, input.value, event);
      else input.reportValidity();
    });
    return this.frame(field, input);
  }
}
