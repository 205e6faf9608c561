// A conversation with one model.

import * as chats from '../chats.js';
import { branch, titleOf } from '../conversation.js';
import { copy } from '../copy.js';
import { h } from '../dom.js';
import { writeOnce } from '../prefs.js';
import { t } from '../words.js';
import { Composer } from './composer.js';
import { picker } from './picker.js';
import { Thread } from './thread.js';

const EXAMPLES = ['example_explain', 'example_code', 'example_translate', 'example_maths'];

export class ChatView {
  constructor(conversation, { opened, lead }) {
    this.conversation = conversation;
    this.picker = picker(conversation);
    this.thread = new Thread(conversation, { empty: () => this.welcome() });
    this.composer = new Composer({
      key: chats.isEmpty(conversation) ? 'new' : conversation.id,
      placeholder: t('writeHere'),
      send: (text) => this.send(text, opened),
      stop: () => chats.stop(conversation),
      isBusy: () => chats.isRunning(conversation),
      editLast: () => this.editLast(),
    });
    this.title = h('h1', { class: 'offscreen' });
    this.heard = [
      chats.on('running', (of) => of === conversation && this.composer.refresh()),
      chats.on('list', () => this.retitle()),
    ];
    this.element = h(
      'main',
      { id: 'main', class: 'view' },
      h('header', { class: 'view-head' }, lead(), this.title, this.picker.element),
      this.thread.element,
      this.composer.element,
    );
    this.retitle();
  }

  retitle() {
    this.title.textContent = titleOf(this.conversation, t('newChat'));
    document.title = `${this.title.textContent} · ingle`;
  }

  send(text, opened) {
    const isNew = chats.isEmpty(this.conversation);
    if (isNew) {
      chats.adopt(this.conversation);
      writeOnce(this.composer.key, null);
      this.composer.belongTo(this.conversation.id);
    }
    chats.send(this.conversation, text);
    if (isNew) opened(this.conversation);
    return true;
  }

  welcome() {
    const examples = EXAMPLES.map((name) =>
      h('button', { type: 'button', class: 'example', onclick: () => this.composer.write(t(name)) }, t(name)),
    );
    return h(
      'div',
      { class: 'empty' },
      h('h2', {}, t('welcome')),
      h('p', { class: 'quiet' }, t('welcomeMore')),
      h('div', { class: 'examples' }, examples),
    );
  }

  editLast() {
    const last = branch(this.conversation).findLast((node) => node.role === 'user');
    if (last && !chats.isRunning(this.conversation)) this.thread.views.get(last.id)?.edit();
  }

  stop() {
    chats.stop(this.conversation);
  }

  isBusy() {
    return chats.isRunning(this.conversation);
  }

  copyLast() {
    const last = branch(this.conversation).findLast((node) => node.role === 'assistant');
    return last ? copy(last.content) : false;
  }

  settings() {
    this.picker.open();
  }

  focus() {
    this.composer.focus();
  }

  close() {
    this.heard.forEach((stop) => stop());
    this.picker.close();
    this.thread.close();
  }
}
