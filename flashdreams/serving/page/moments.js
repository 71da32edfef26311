// Moments: save on disk, fork on the device, and rewind.

import { byId, element } from './dom.js';

const NAME = /^[\w-]{1,64}$/;

/** The form to save or fork a moment, and the list of moments to rewind to. */
export class Moments {
  /** @param {function(Object)} onCommand called with `{type, name}` */
  constructor(onCommand) {
    this.onCommand = onCommand;
    this.names = [];
    this.input = byId('moment-name');
    byId('moments-form').addEventListener('submit', (event) => {
      event.preventDefault();
      this.keep(event.submitter?.value ?? this.first);
    });
  }

  /**
   * Draw what this session accepts.
   * @param {string[]} commands
   * @param {string[]} saved
   */
  draw(commands, saved) {
    this.commands = commands;
    this.first = commands.includes('save') ? 'save' : 'fork';
    const kept = commands.includes('save') || commands.includes('fork');
    byId('moments').hidden = !kept && !commands.includes('rewind');
    byId('moments-form').hidden = !kept;
    for (const kind of ['save', 'fork']) byId(kind).hidden = !commands.includes(kind);
    this.list(saved);
  }

  /** @param {string[]} saved */
  list(saved) {
    this.names = saved;
    this.input.placeholder = this.freeName();
    const canRewind = this.commands.includes('rewind');
    const items = saved.map((name) =>
      element(
        'li',
        {},
        element('span', {}, name),
        element(
          'button',
          {
            type: 'button', disabled: !canRewind, 'aria-label': `Rewind to ${name}`,
            onclick: () => this.onCommand({ type: 'session.rewind', name }),
          },
          'Rewind',
        ),
      ),
    );
    byId('moments-list').replaceChildren(...items);
    byId('moments-none').hidden = Boolean(items.length);
  }

  freeName() {
    let count = 1;
    while (this.names.includes(`moment-${count}`)) count += 1;
    return `moment-${count}`;
  }

  keep(kind) {
    const name = this.input.value.trim().replace(/\s+/g, '-') || this.input.placeholder;
    if (!NAME.test(name)) {
      this.input.setCustomValidity('Use letters, digits, - and _, at most 64.');
      this.input.reportValidity();
      this.input.addEventListener('input', () => this.input.setCustomValidity(''), { once: true });
      return;
    }
    this.input.value = '';
    this.onCommand({ type: `session.${kind}`, name });
  }
}
