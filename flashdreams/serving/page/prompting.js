// The prompt of a running session.

import { byId, setText } from './dom.js';

/** The prompt box; Enter applies, Shift+Enter starts a new line. */
export class Prompting {
  /** @param {function(string): boolean} onPrompt called with the text; false: it could not be sent */
  constructor(onPrompt) {
    this.box = byId('prompt');
    byId('prompt-form').addEventListener('submit', (event) => {
      event.preventDefault();
      this.apply(onPrompt);
    });
    this.box.addEventListener('keydown', (event) => {
      if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.apply(onPrompt);
    });
  }

  apply(onPrompt) {
    const text = this.box.value.trim();
    if (this.box.readOnly || !text) return;
    this.say(onPrompt(text) ? 'Sent …' : 'Not sent: no connection.');
  }

  /** @param {{prompts_change: boolean, prompt: ?string}} what an offer, or the like */
  draw({ prompts_change: change, prompt }) {
    byId('prompting').hidden = !change && !prompt;
    this.box.readOnly = !change;
    byId('prompt-apply').hidden = !change;
    this.box.value = prompt ?? '';
    this.say(change ? 'Enter applies it from the next chunk on.' : 'The prompt cannot change in this session.');
  }

  /** @param {Object} start `video.start` */
  onStart(start) {
    const typed = this.box.value;
    const isEdited = start.resumed && typed;
    this.draw({ prompts_change: start.prompts_change, prompt: start.config.prompt });
    if (isEdited) this.box.value = typed;
  }

  /** @param {number} chunk */
  onApplied(chunk) {
    this.refusal?.remove();
    this.say(`Applied in chunk ${chunk}.`);
  }

  /** @param {HTMLElement} message says why; it goes once a prompt is applied */
  onRefused(message) {
    this.refusal?.remove();
    this.refusal = message;
    this.say('Not applied.');
  }

  say(text) {
    setText(byId('prompt-help'), text);
  }
}
