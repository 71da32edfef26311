// The page of a live session, assembled from its parts.

import { Actions } from './actions.js';
import { Connection, bodyOf, explained } from './connection.js';
import { Steering } from './steering.js';
import { byId, setText } from './dom.js';
import { Figures } from './figures.js';
import { Memory } from './memory.js';
import { Moments } from './moments.js';
import { Opening } from './opening.js';
import { Player } from './player.js';
import { Prompting } from './prompting.js';
import { Receipts } from './receipts.js';
import { Recorder } from './recorder.js';
import { StatusLine } from './status.js';

/** The state of the page. */
class Page {
  constructor() {
    this.count = 0;
    this.kinds = new Map(); // identifiers of events -> what they were
    this.status = new StatusLine();
    this.receipts = new Receipts((message) => this.connection.send(message));
    this.recorder = new Recorder();
    this.player = new Player(byId('picture'), byId('film'), {
      onShown: (frame, time) => this.onShown(frame, time),
      onDropped: (count) => this.receipts.onDropped(count),
      onChange: (format, reason) => this.onWay(reason),
    });
    this.figures = new Figures(this.receipts, this.player);
    this.memory = new Memory(() => this.receipts.lastFrame);
    this.steering = new Steering({
      onValues: (values, time) => this.sendControl(values, time),
      onSet: (values) => this.memory.keep(values),
    });
    this.prompting = new Prompting((text) => this.sendPrompt(text));
    this.moments = new Moments((message) => this.sendEvent(message.type.split('.')[1], message));
    this.opening = new Opening(() => this.beginAnew());
    this.actions = new Actions(this);
    this.connection = new Connection({
      onState: (state, detail) => this.onState(state, detail),
      onMessage: (message) => this.onMessage(message),
      onMedia: (meta, buffer) => this.onMedia(meta, buffer),
      opening: () => this.firstMessage(),
    });
    byId('begin').addEventListener('click', () => this.beginAnew());
  }

  /** Show the page, connect. */
  async run() {
    const query = new URLSearchParams(location.search);
    if (query.has('token')) {
      // The server has set a cookie; the address bar and the history need not show the token.
      query.delete('token');
      const rest = query.size ? `?${query}` : '';
      history.replaceState(null, '', `${location.pathname}${rest}${location.hash}`);
    }
    const drawn = setTimeout(() => this.reveal(), 3000);
    await Promise.all([this.player.prepare(query.get('player')), this.memory.load()]);
    const offer = this.loadOffer().finally(() => (clearTimeout(drawn), this.reveal()));
    if (await offer) this.connection.open();
  }

  reveal() {
    document.body.dataset.drawn = '';
  }

  /** Draw the server's offer. @returns {Promise<boolean>} false: access denied */
  async loadOffer() {
    if (this.offer) return true;
    try {
      const reply = await fetch('v1/models', { cache: 'no-store' });
      if (reply.status === 401 || reply.status === 403) {
        const { message } = await bodyOf(reply);
        const how = 'Open the address printed by the server, which includes the token.';
        this.status.set('ended', `${message ?? ''} ${how}`);
        byId('begin').hidden = true;
        return false;
      }
      const [offer] = (await reply.json()).data ?? [];
      if (offer) this.drawOffer(offer);
    } catch {
      // The server is still starting: video.start has the rest.
    }
    return true;
  }

  drawOffer(offer) {
    this.offer = offer;
    document.body.dataset.offered = '';
    if (offer.formats && !offer.formats.includes('m4s')) this.player.useJpeg();
    setText(byId('model'), offer.id ?? offer.model);
    this.resize(offer);
    this.opening.draw(offer);
    this.prompting.draw(offer);
    this.moments.draw(offer.commands ?? [], []);
    this.steering.draw(offer.controls, this.memory.session?.values);
    this.actions.draw(offer.commands ?? []);
  }

  resize({ width, height }) {
    document.documentElement.style.setProperty('--ratio', String(width / height));
  }

  firstMessage() {
    const session = this.memory.session;
    if (!session) return this.opening.message(this.player.format);
    const from = this.memory.fromFrame;
    return { type: 'session.resume', token: session.token, from_frame: from, format: this.player.format };
  }

  /** Leave the session of this page and start another. */
  beginAnew() {
    this.connection.send({ type: 'session.stop' });
    this.memory.forget();
    this.receipts.begin();
    this.connection.open();
    byId('opening').open = false;
    byId('stage').focus({ preventScroll: true });
  }

  onState(state, detail) {
    if (state === 'live') this.loadOffer();
    if (state === 'ended') {
      this.memory.forget();
      this.actions.finishRecording();
    }
    this.status.set(state, detail);
    this.actions.onState(state);
  }

  onMessage(message) {
    const handlers = {
      'video.start': (start) => this.onStart(start),
      'session.interaction.applied': (applied) => this.onApplied(applied),
      'session.kept': (kept) => this.onKept(kept),
      'session.status': (status) => this.onStatus(status),
      error: (error) => this.onError(error),
    };
    handlers[message.type]?.(message);
  }

  onStart(start) {
    const { config } = start;
    setText(byId('model'), config.model);
    this.resize(config);
    document.body.dataset.offered = '';
    if (!start.resumed) this.receipts.begin();
    else this.receipts.resume(start.first_frame);
    this.memory.remember(start.token);
    this.player.begin({ codec: start.codec, fps: config.fps });
    this.recorder.begin(config.fps);
    this.figures.begin(config.fps);
    this.prompting.onStart(start);
    this.moments.draw(start.commands, start.saved);
    this.actions.draw(start.commands);
    this.steering.draw(start.controls, start.resumed ? this.memory.session.values : {});
    if (start.resumed) this.steering.repeat();
  }

  onMedia(meta, buffer) {
    if (this.player.format === 'm4s') this.recorder.push(meta, buffer);
    this.player.push(meta, buffer);
    if (document.hidden) {
      // Nothing is drawn on a hidden page, but arrived frames count as shown.
      this.player.clear();
      this.receipts.onUnseen(meta.first_frame + meta.num_frames - 1);
    }
  }

  onShown(frame, time) {
    this.receipts.onShown(frame, time);
    if (this.status.state !== 'live') return;
    this.status.set('ready');
    if (document.activeElement === document.body) byId('stage').focus({ preventScroll: true });
  }

  onApplied(message) {
    this.receipts.onApplied(message);
    this.figures.onApplied(message);
    // A turning view stays smooth; other inputs are shown at once.
    if (message.event_ids.some((id) => this.kinds.has(id) && this.kinds.get(id) !== 'look')) {
      this.player.hurry(message.first_frame);
    }
    if (message.event_ids.some((id) => this.kinds.get(id) === 'prompt')) {
      this.prompting.onApplied(message.generation_chunk_index);
    }
  }

  onKept({ command, name, saved }) {
    this.moments.list(saved);
    const words = { save: `Saved “${name}”`, fork: `Forked “${name}”`, rewind: `Rewound to “${name}”`, reset: 'Restarted' };
    this.status.show(words[command]);
    // The controller's state was also reset: send what is held and set now.
    if (command === 'rewind' || command === 'reset') this.steering.repeat();
  }

  onStatus(status) {
    this.figures.onStatus(status);
    const shown = ['live', 'ready', 'paused', 'parked', 'waiting'];
    if (!shown.includes(this.status.state)) return;
    this.actions.onPaused(status.state === 'paused');
    const running = this.status.state === 'live' ? 'live' : 'ready';
    const state = status.state === 'running' ? running : status.state;
    if (performance.now() > this.actions.settled) this.status.set(state);
  }

  onError(error) {
    if (error.allowed?.format?.includes('jpeg') && this.player.useJpeg()) {
      this.connection.open();
      return;
    }
    if (this.status.state === 'ended') return; // the cover says why
    if (error.code === 'unknown_session') {
      this.memory.forget();
      this.status.show('The previous session has ended; this is a new one.');
      this.connection.open();
      return;
    }
    if (error.code === 'not_ready' || error.code === 'draining') return; // it connects again
    const message = this.status.show(explained(error), 'error');
    if (this.kinds.get(error.event_id) === 'prompt') this.prompting.onRefused(message);
  }

  /** Another way to show video is needed: resume the session in its format. */
  onWay(reason) {
    this.status.show(`Switched to another video format (${reason}).`);
    this.connection.open();
  }

  /**
   * Send a message that the server answers with "applied" or "kept".
   * @param {string} kind
   * @param {Object} message
   * @param {?number} time of the input event, if the latency to its frame is measured
   */
  sendEvent(kind, message, time = null) {
    this.count += 1;
    const id = `${kind}-${Date.now().toString(36)}-${this.count}`;
    if (this.kinds.size > 500) this.kinds.delete(this.kinds.keys().next().value);
    this.kinds.set(id, kind);
    if (message.type === 'session.interaction') message.interaction.event_id = id;
    else message.event_id = id;
    const sent = this.connection.send(message);
    if (sent && time !== null) this.receipts.onSent(id, time);
    return sent;
  }

  sendControl(values, time) {
    const kind = 'look' in values ? 'look' : 'control';
    return this.sendEvent(kind, { type: 'session.control', values }, time);
  }

  sendPrompt(text) {
    const message = { type: 'session.interaction', interaction: { event: { prompt: text } } };
    return this.sendEvent('prompt', message);
  }
}

new Page().run();
