// The messages of a branch, in a box that scrolls. It follows an answer as long as its end is in sight, and no longer.

import * as chats from '../chats.js';
import { branch } from '../conversation.js';
import { h, iconButton } from '../dom.js';
import { t } from '../words.js';
import { MessageView } from './message.js';

const NEAR_PX = 60;

export class Thread {
  constructor(conversation, { empty, label }) {
    this.conversation = conversation;
    this.empty = empty;
    this.views = new Map();
    this.stuck = true;
    this.column = h('div', { class: 'column', role: 'log', 'aria-label': label ?? t('messages'), 'aria-live': 'off' });
    this.toEnd = iconButton('down', t('toEnd'), () => this.follow(), { class: 'icon-button to-end', hidden: true });
    this.box = h('div', { class: 'thread', tabindex: '-1' }, this.column);
    this.element = h('div', { class: 'thread-frame' }, this.box, this.toEnd);
    this.box.addEventListener('scroll', () => this.scrolled(), { passive: true });
    this.near = new IntersectionObserver(
      (entries) =>
        entries.forEach((entry) => {
          if (entry.isIntersecting) this.views.get(entry.target.dataset.node)?.reveal();
        }),
      { root: this.box, rootMargin: '1200px 0px' },
    );
    this.resized = new ResizeObserver(() => this.settle());
    this.resized.observe(this.column);
    this.resized.observe(this.box);
    this.wanted = new Set();
    this.heard = [
      chats.on('tree', (changed) => changed === conversation && this.draw({ jump: true })),
      chats.on('node', ({ conversation: of, node }) => of === conversation && this.later(node)),
      chats.on('ended', ({ conversation: of, node }) => of === conversation && this.views.get(node.id)?.ended()),
    ];
    this.draw({ jump: true });
  }

  close() {
    this.heard.forEach((stop) => stop());
    this.near.disconnect();
    this.resized.disconnect();
  }

  draw({ jump = false } = {}) {
    const shown = branch(this.conversation);
    const ids = new Set(shown.map((node) => node.id));
    for (const [id, view] of this.views) {
      if (ids.has(id)) continue;
      this.near.unobserve(view.element);
      view.element.remove();
      this.views.delete(id);
    }
    if (!shown.length && this.empty) this.column.replaceChildren(this.empty());
    else this.column.querySelector(':scope > .empty')?.remove();
    shown.forEach((node, at) => {
      const view = this.views.get(node.id) ?? this.made(node);
      if (this.column.children[at] !== view.element)
        this.column.insertBefore(view.element, this.column.children[at] ?? null);
      view.refresh();
    });
    if (jump) this.follow();
  }

  made(node) {
    const view = new MessageView(this.conversation, node);
    this.views.set(node.id, view);
    this.near.observe(view.element);
    return view;
  }

  // Once a frame, however many events come in between.
  later(node) {
    if (!this.wanted.size) requestAnimationFrame(() => this.now());
    this.wanted.add(node);
  }

  now() {
    for (const node of this.wanted) this.views.get(node.id)?.update();
    this.wanted.clear();
    this.settle();
  }

  settle() {
    if (this.stuck) this.box.scrollTop = this.box.scrollHeight;
    else this.scrolled();
  }

  follow() {
    this.stuck = true;
    this.settle();
    this.toEnd.hidden = true;
  }

  scrolled() {
    const { scrollHeight, scrollTop, clientHeight } = this.box;
    const atEnd = scrollHeight - scrollTop - clientHeight < NEAR_PX;
    if (scrollTop < (this.lastTop ?? 0) && !atEnd) this.stuck = false;
    else if (atEnd) this.stuck = true;
    this.lastTop = scrollTop;
    this.toEnd.hidden = atEnd;
  }
}
