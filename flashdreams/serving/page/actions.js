// The buttons below the video: pause, reset, record, full screen, stop.

import { byId, setText } from './dom.js';
import { download } from './recorder.js';

const HIDDEN_MS = 10_000;
const SETTLING_MS = 1500;

/** The buttons, enabled according to the state. */
export class Actions {
  /** @param {Object} page its `connection`, `recorder`, `player`, `status` and `sendEvent` */
  constructor(page) {
    this.page = page;
    this.paused = false;
    this.settled = 0;
    this.state = 'loading';
    this.commands = [];
    const click = (id, action) => byId(id).addEventListener('click', action);
    click('pause', () => this.pause(!this.paused));
    click('reset', () => page.sendEvent('reset', { type: 'session.reset' }));
    click('record', () => (page.recorder.recording ? this.finishRecording() : this.record()));
    click('fullscreen', () => this.fullScreen());
    click('stop', () => page.connection.stop());
    byId('fullscreen').hidden = !document.fullscreenEnabled;
    document.addEventListener('visibilitychange', () => this.onVisible());
    setInterval(() => this.tellLength(), 500);
  }

  /** @param {string[]} commands that this session accepts */
  draw(commands) {
    this.commands = commands;
    this.onState(this.state);
  }

  /** @param {string} state as of `Connection` */
  onState(state) {
    this.state = state;
    const live = state === 'live';
    if (live) this.showPaused(false);
    for (const id of ['pause', 'reset', 'record']) byId(id).disabled = !live;
    byId('stop').disabled = state === 'ended';
    byId('reset').hidden = !this.commands.includes('reset');
    if (this.page.player?.format === 'jpeg') {
      byId('record').disabled = true;
      byId('record').title = 'Recording needs H.264; this browser receives JPEG frames.';
    }
    for (const id of ['save', 'fork', 'prompt-apply']) byId(id).disabled = !live;
    byId('moments-list').inert = !live;
  }

  /** @param {boolean} paused as the server reports; a request takes effect after a chunk */
  onPaused(paused) {
    if (performance.now() < this.settled) return;
    this.showPaused(paused);
  }

  showPaused(paused) {
    this.paused = paused;
    const button = byId('pause');
    button.setAttribute('aria-pressed', String(paused));
    setText(button.querySelector('span'), paused ? 'Resume' : 'Pause');
  }

  pause(paused) {
    if (!this.page.connection.send({ type: 'session.pause', paused })) return;
    this.showPaused(paused);
    this.settled = performance.now() + SETTLING_MS;
    this.page.status.set(paused ? 'paused' : 'ready');
  }

  record() {
    if (!this.page.connection.send({ type: 'session.key' })) return;
    this.page.recorder.start();
    this.tellLength();
  }

  /** Offer the recording for download, if there is one. */
  finishRecording() {
    const { recorder, status } = this.page;
    if (!recorder.recording) return;
    const when = new Date().toISOString().slice(0, 19).replace(/[T:]/g, '-');
    const file = recorder.stop();
    if (file) download(file, `${status.name}-${when}.mp4`);
    this.tellLength();
  }

  tellLength() {
    const { recorder } = this.page;
    if (!recorder) return;
    byId('record').setAttribute('aria-pressed', String(recorder.recording));
    const seconds = Math.floor(recorder.seconds);
    const clock = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, '0')}`;
    setText(byId('record-text'), recorder.recording ? clock : 'Record');
    byId('record').setAttribute('aria-label', recorder.recording ? 'Stop recording' : 'Record');
  }

  fullScreen() {
    if (document.fullscreenElement) document.exitFullscreen();
    else byId('view').requestFullscreen().then(() => byId('stage').focus());
  }

  /** A hidden page pauses its session, to free the machine for others. */
  onVisible() {
    clearTimeout(this.hiding);
    if (document.hidden) {
      this.hiding = setTimeout(() => {
        if (this.paused || this.state !== 'live' || this.page.recorder.recording) return;
        this.pause(true);
        this.byItself = true;
      }, HIDDEN_MS);
    } else if (this.byItself) {
      this.byItself = false;
      this.pause(false);
    }
  }
}
