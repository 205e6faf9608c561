// One prompt, two models or two settings, and how fast each answers.

import { note } from '../announce.js';
import * as chats from '../chats.js';
import { branch, titleFrom } from '../conversation.js';
import { copy } from '../copy.js';
import { h } from '../dom.js';
import { read, write, writeOnce } from '../prefs.js';
import { number, seconds, t } from '../words.js';
import { Composer } from './composer.js';
import { picker } from './picker.js';
import { Thread } from './thread.js';

const NAMES = ['A', 'B'];

export class CompareView {
  constructor(record, { opened, lead }) {
    this.record = record;
    this.lanes = record.lanes.map((lane, at) => new Lane(lane, NAMES[at]));
    this.inTurn = h('input', {
      type: 'checkbox',
      checked: read('inTurn', false),
      onchange: () => write('inTurn', this.inTurn.checked),
    });
    this.composer = new Composer({
      key: chats.isEmpty(record) ? 'compare' : record.id,
      placeholder: t('writeToBoth'),
      send: (text) => this.send(text, opened),
      stop: () => this.stop(),
      isBusy: () => this.isBusy(),
    });
    this.heard = [chats.on('running', () => this.composer.refresh())];
    const head = h(
      'header',
      { class: 'view-head' },
      lead(),
      h('h1', { class: 'view-title' }, t('compare')),
      h('label', { class: 'check', title: t('inTurnWhy') }, this.inTurn, h('span', {}, t('inTurn'))),
    );
    document.title = `${t('compare')} · ingle`;
    this.element = h(
      'main',
      { id: 'main', class: 'view compare' },
      head,
      h(
        'div',
        { class: 'lanes' },
        this.lanes.map((lane) => lane.element),
      ),
      this.composer.element,
    );
  }

  send(text, opened) {
    const isNew = chats.isEmpty(this.record);
    if (isNew) {
      chats.adopt(this.record);
      writeOnce(this.composer.key, null);
      this.composer.belongTo(this.record.id);
    }
    this.record.title ||= titleFrom(text);
    this.ask(text);
    if (isNew) opened(this.record);
    return true;
  }

  async ask(text) {
    const [one, other] = this.record.lanes;
    if (!this.inTurn.checked) {
      for (const lane of this.record.lanes) chats.send(lane, text);
      return;
    }
    chats.say(other, text);
    await chats.send(one, text);
    if (branch(one).at(-1).finish !== 'stopped') await chats.reply(other);
    else note(t('secondLeftOut'));
  }

  stop() {
    this.record.lanes.forEach(chats.stop);
  }

  isBusy() {
    return this.record.lanes.some(chats.isRunning);
  }

  copyLast() {
    const text = this.record.lanes.map(
      (lane) => branch(lane).findLast((node) => node.role === 'assistant')?.content ?? '',
    );
    return copy(text.join('\n\n---\n\n'));
  }

  settings() {
    this.lanes[0].picker.open();
  }

  focus() {
    this.composer.focus();
  }

  close() {
    this.heard.forEach((stop) => stop());
    this.lanes.forEach((lane) => lane.close());
  }
}

class Lane {
  constructor(conversation, name) {
    this.conversation = conversation;
    const label = t('lane', { name });
    this.picker = picker(conversation, { label: `${label}: ${t('model')}`, common: false });
    this.figures = h('dl', { class: 'figures' });
    this.thread = new Thread(conversation, {
      label,
      empty: () => h('p', { class: 'empty quiet' }, t('laneEmpty', { name })),
    });
    this.heard = [
      chats.on('node', ({ conversation: of }) => of === conversation && this.later()),
      chats.on('tree', (of) => of === conversation && this.draw()),
    ];
    this.element = h(
      'section',
      { class: 'lane', 'aria-label': label },
      h('header', {}, h('span', { class: 'lane-name', 'aria-hidden': 'true' }, name), this.picker.element),
      this.figures,
      this.thread.element,
    );
    this.draw();
  }

  later() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.draw();
    });
  }

  draw() {
    const stats = branch(this.conversation).findLast((node) => node.role === 'assistant')?.stats ?? {};
    const shown = [
      ['tokensPerS', stats.perSecond === undefined ? '–' : number(stats.perSecond, 1)],
      ['ttft', stats.ttft_s === undefined ? '–' : seconds(stats.ttft_s)],
      ['tokensOut', stats.tokens === undefined ? '–' : number(stats.tokens)],
    ];
    this.figures.replaceChildren(
      ...shown.map(([name, value]) => h('div', { 'data-figure': name }, h('dt', {}, t(name)), h('dd', {}, value))),
    );
  }

  close() {
    this.heard.forEach((stop) => stop());
    this.picker.close();
    this.thread.close();
  }
}
