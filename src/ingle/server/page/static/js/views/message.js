// One message: what it says, what was thought and called, how fast it came, and what can be done with it.

import { announce } from '../announce.js';
import * as chats from '../chats.js';
import { choose, siblings } from '../conversation.js';
import { copyButton } from '../copy.js';
import { h, icon, iconButton } from '../dom.js';
import { Growing } from '../markdown.js';
import { seconds, t } from '../words.js';
import { stateView, statsView } from './state.js';

export class MessageView {
  constructor(conversation, node) {
    this.conversation = conversation;
    this.node = node;
    this.body = h('div', { class: 'body' });
    this.foot = h('footer', {});
    this.element = h(
      'article',
      { class: `message ${node.role}`, 'data-node': node.id, 'aria-label': t(`says_${node.role}`) },
      this.body,
      this.foot,
    );
    this.lazy = true;
    this.draw();
  }

  // All of it, but for the text where that is far away: `reveal` draws it when it comes near.
  draw() {
    this.body.replaceChildren();
    this.text = this.thought = null;
    if (this.node.role === 'assistant') this.update();
    else if (this.node.role === 'tool')
      this.body.append(
        h('p', { class: 'tool-name' }, icon('onward'), this.node.name),
        h('pre', { tabindex: '0' }, this.node.content),
      );
    else this.body.append(h('div', { class: 'said' }, this.node.content));
    this.drawFoot();
  }

  reveal() {
    if (!this.lazy) return;
    this.lazy = false;
    if (this.node.role === 'assistant') this.update();
  }

  update() {
    const { node } = this;
    const running = Boolean(node.running);
    this.element.classList.toggle('running', running);
    this.element.setAttribute('aria-busy', String(running));
    if (this.lazy && !running) {
      this.body.replaceChildren(h('div', { class: 'prose unformatted' }, node.content));
      return;
    }
    if (this.lazy || this.body.querySelector('.unformatted')) {
      this.lazy = false;
      this.body.replaceChildren();
    }
    if (node.reasoning) this.showThought(running);
    if (node.content) {
      this.text ??= new Growing(this.body.appendChild(h('div', { class: 'prose' })));
      this.text.show(node.content, { whole: !running });
    }
    this.showCalls(running);
    this.showState(running);
  }

  // After messages came or went around it. Who writes in it is left alone, and so is a button that has the focus.
  refresh() {
    if (this.body.querySelector('.editor')) return;
    if (!this.foot.contains(document.activeElement)) this.drawFoot();
    if (this.node.role === 'assistant' && !this.node.running) this.showCalls(false);
  }

  // Draws the foot too, once the answer is whole.
  ended() {
    this.update();
    this.drawFoot();
  }

  showThought(running) {
    const { node } = this;
    if (!this.thought) {
      this.thought = { summary: h('summary', {}), prose: h('div', { class: 'prose' }) };
      this.thought.element = h('details', { class: 'thought' }, this.thought.summary, this.thought.prose);
      this.thought.text = new Growing(this.thought.prose);
      this.thought.element.addEventListener('toggle', () => this.showThought(Boolean(this.node.running)));
      this.body.prepend(this.thought.element);
    }
    const { element, summary, text } = this.thought;
    const thinking = running && !node.content && !node.calls.length;
    const took = node.stats?.thought_s;
    summary.textContent = thinking ? t('thinking') : took ? t('thoughtFor', { time: seconds(took) }) : t('thought');
    element.classList.toggle('active', thinking);
    if (element.open) text.show(node.reasoning, { whole: !thinking });
  }

  showCalls(running) {
    const { node } = this;
    if (!node.calls?.length) return;
    this.calls ??= h('div', { class: 'calls' });
    if (!this.calls.isConnected) this.body.append(this.calls);
    while (this.calls.children.length < node.calls.length) this.calls.append(callView());
    node.calls.forEach((call, at) => {
      const view = this.calls.children[at];
      view.querySelector('.call-name').textContent = call.name;
      view.querySelector('code').textContent = running ? call.arguments : pretty(call.arguments);
    });
    const answered = Object.values(this.conversation.nodes).some((each) => each.parent === node.id);
    const asks = !running && !answered && !node.error;
    if (asks && !this.results) this.body.append((this.results = this.resultForm()));
    if (asks) return;
    this.results?.remove();
    this.results = null;
  }

  resultForm() {
    const fields = this.node.calls.map((call) =>
      h('textarea', {
        rows: '2',
        placeholder: t('resultOf', { name: call.name }),
        'aria-label': t('resultOf', { name: call.name }),
      }),
    );
    const give = () =>
      chats.giveResults(
        this.conversation,
        this.node,
        fields.map((field) => field.value),
      );
    return h(
      'form',
      {
        class: 'results',
        onsubmit: (event) => {
          event.preventDefault();
          give();
        },
      },
      fields,
      h('button', { class: 'button', type: 'submit' }, t('giveResults')),
    );
  }

  // What is to be said beside the text: how far the prompt is read, that it was cut off, or what went wrong.
  showState(running) {
    this.state?.remove();
    this.state = stateView(this.node, running);
    if (this.state) this.body.append(this.state);
    this.retry(running);
    if (running) this.foot.replaceChildren(statsView(this.node, true));
  }

  retry(running) {
    const { conversation, node } = this;
    if (running) return;
    if (node.error) this.state?.append(actionButton('again', () => chats.again(conversation, node)));
    const cut = ['length', 'stopped', 'interrupted'].includes(node.finish) || (node.error && node.content);
    if (cut && node.content && !node.calls?.length)
      this.state?.append(actionButton('goOn', () => chats.goOn(conversation, node)));
  }

  drawFoot() {
    const { conversation, node } = this;
    if (node.running) return;
    const actions = [this.branches(), node.role === 'tool' ? null : copyButton(() => node.content)];
    if (node.role !== 'tool') actions.push(iconButton('edit', t('edit'), () => this.edit()));
    if (node.role === 'assistant')
      actions.push(iconButton('turn', t('regenerate'), () => chats.again(conversation, node)));
    this.foot.replaceChildren(h('div', { class: 'actions' }, actions.filter(Boolean)), statsView(node, false));
  }

  branches() {
    const all = siblings(this.conversation, this.node);
    if (all.length < 2) return null;
    const at = all.indexOf(this.node);
    const go = (step) => () => {
      choose(this.conversation, all[at + step]);
      chats.chosen(this.conversation);
      const moved = document.querySelector(`[data-node="${all[at + step].id}"] .branches button:not(:disabled)`);
      moved?.focus();
      announce(t('branchOf', { at: at + step + 1, of: all.length }));
    };
    return h(
      'span',
      { class: 'branches', role: 'group', 'aria-label': t('branches') },
      iconButton('left', t('before'), go(-1), { disabled: at === 0 }),
      h('span', { 'aria-label': t('branchOf', { at: at + 1, of: all.length }) }, `${at + 1}/${all.length}`),
      iconButton('right', t('after'), go(1), { disabled: at === all.length - 1 }),
    );
  }

  edit() {
    const { conversation, node } = this;
    const field = h('textarea', { class: 'editor', 'aria-label': t('edit'), value: node.content });
    const back = () => {
      this.draw();
      this.reveal();
      this.element.querySelector('.actions button')?.focus();
    };
    const take = () => {
      if (node.role === 'user' && !field.value.trim()) return;
      if (field.value === node.content && node.role === 'assistant') back();
      else chats.edit(conversation, node, field.value);
    };
    field.addEventListener('keydown', (event) => {
      if (event.isComposing || event.keyCode === 229) return;
      if (event.key === 'Escape') {
        event.stopPropagation();
        back();
      }
      if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        take();
      }
    });
    const grow = () => {
      field.style.height = 'auto';
      field.style.height = `${field.scrollHeight + 2}px`;
    };
    field.addEventListener('input', grow);
    const buttons = h(
      'div',
      { class: 'editor-buttons' },
      h('button', { type: 'button', class: 'button plain', onclick: back }, t('cancel')),
      h('button', { type: 'button', class: 'button', onclick: take }, t(node.role === 'user' ? 'send' : 'keep')),
    );
    this.body.replaceChildren(field, buttons);
    this.foot.replaceChildren();
    this.text = this.thought = this.results = null;
    grow();
    field.focus();
  }
}

function callView() {
  return h(
    'div',
    { class: 'call' },
    h('p', { class: 'tool-name' }, icon('onward'), h('span', { class: 'call-name' })),
    h('pre', { tabindex: '0' }, h('code', {})),
  );
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function actionButton(name, onclick) {
  return h('button', { type: 'button', class: 'text-button', onclick }, t(name));
}
