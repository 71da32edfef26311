// The status line, and the cover over the video while there is none.

import { byId, element, setText } from './dom.js';

const WORDS = {
  connecting: 'Connecting',
  live: 'Starting',
  ready: 'READY',
  paused: 'Paused',
  parked: 'Parked',
  waiting: 'Waiting for its turn',
};
const PHASES = { warming: 'Warming up', draining: 'Restarting', failed: 'Failed' };
const ENDS = {
  stopped: 'Stopped.',
  done: 'The video is complete.',
};
const CALM = new Set(['ready', 'paused']);

/** The status line, the cover of the stage, and temporary messages. */
export class StatusLine {
  constructor() {
    this.text = byId('status-text');
    this.line = byId('status');
    this.cover = byId('cover');
    this.messages = byId('messages');
  }

  /**
   * Show a state.
   * @param {string} state
   * @param {*} detail the server's words, a position or seconds
   */
  set(state, detail) {
    clearInterval(this.countdown);
    this.state = state;
    this.line.dataset.state = state;
    this.cover.hidden = CALM.has(state);
    byId('begin').hidden = state !== 'ended';
    if (state === 'reconnecting') this.count(detail);
    else this.say(...this.wordsOf(state, detail));
  }

  wordsOf(state, detail) {
    if (state === 'loading') {
      const { phase, message, seconds } = detail ?? {};
      const so = seconds > 2 ? ` ${Math.round(seconds)} s so far.` : '';
      return [PHASES[phase] ?? 'Loading', `${message ?? ''}${so}`];
    }
    if (state === 'queued') {
      const ahead = detail - 1;
      const before = ahead > 0 ? `${ahead} ahead of you. ` : 'You are next. ';
      return [`Queued, position ${detail}`, `${before}The session starts automatically when a place is free.`];
    }
    if (state === 'ended') return ['Ended', ENDS[detail] ?? detail ?? ''];
    return [WORDS[state] ?? state, ''];
  }

  count(seconds) {
    const end = performance.now() + seconds * 1000;
    const tell = () => {
      const left = Math.max(0, Math.ceil((end - performance.now()) / 1000));
      // Only the cover counts down; a line that is read aloud should not change every second.
      this.say('Reconnecting', left ? `Next try in ${left} s.` : 'Trying now.');
    };
    tell();
    this.countdown = setInterval(tell, 500);
  }

  say(words, detail) {
    setText(this.text, words);
    setText(byId('cover-title'), words);
    setText(byId('cover-detail'), detail);
    document.title = words === 'READY' ? this.name : `${words} · ${this.name}`;
  }

  /** @returns {string} */
  get name() {
    return byId('model').textContent;
  }

  /**
   * Show a message for some seconds.
   * @param {string} text
   * @param {"error"|"note"} kind
   * @returns {HTMLElement} the message
   */
  show(text, kind = 'note') {
    const known = [...this.messages.children].find((node) => node.firstChild.textContent === text);
    known?.remove();
    const close = element('button', { type: 'button', 'aria-label': 'Close', class: 'close' }, '×');
    const role = kind === 'error' ? 'alert' : null;
    const node = element('div', { class: `message ${kind}`, role }, element('p', {}, text), close);
    close.addEventListener('click', () => node.remove());
    this.messages.append(node);
    while (this.messages.children.length > 3) this.messages.firstChild.remove();
    setTimeout(() => node.remove(), kind === 'error' ? 15_000 : 4_000);
    return node;
  }
}
