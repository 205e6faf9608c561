// All conversations, and the ways to the rest of the page.

import { note } from '../announce.js';
import { BASE } from '../api.js';
import * as chats from '../chats.js';
import { titleOf } from '../conversation.js';
import { h, icon, iconButton, menuButton } from '../dom.js';
import * as store from '../store.js';
import { exported } from '../transfer.js';
import { t } from '../words.js';
import { download } from './preferences.js';

const DAY_MS = 86400000;

export class Sidebar {
  constructor({ go, current, close, preferences, help }) {
    Object.assign(this, { go, current });
    this.search = h('input', {
      type: 'search',
      placeholder: t('search'),
      'aria-label': t('search'),
      oninput: () => this.draw(),
    });
    this.entries = h('div', { class: 'entries' });
    const way = (name, image, href) =>
      h('a', { href, class: 'way', 'data-way': name }, icon(image), h('span', {}, t(name)));
    this.element = h(
      'nav',
      { class: 'sidebar', 'aria-label': t('navigation') },
      h(
        'div',
        { class: 'brand' },
        h('a', { href: '#/', class: 'name' }, brandMark(), 'ingle'),
        iconButton('close', t('hideSidebar'), close, { class: 'icon-button hide' }),
      ),
      h(
        'div',
        { class: 'ways' },
        way('newChat', 'add', '#/'),
        way('compare', 'compare', '#/compare'),
        way('status', 'pulse', '#/status'),
      ),
      h('div', { class: 'search' }, icon('search'), this.search),
      this.entries,
      h(
        'div',
        { class: 'ways end' },
        h(
          'a',
          { href: new URL('docs', BASE).href, class: 'way', target: '_blank', rel: 'noopener' },
          icon('book'),
          h('span', {}, t('apiDocs')),
        ),
        h(
          'button',
          { type: 'button', class: 'way', onclick: preferences, 'aria-haspopup': 'dialog' },
          icon('gear'),
          h('span', {}, t('preferences')),
        ),
        h(
          'button',
          { type: 'button', class: 'way', onclick: help, 'aria-haspopup': 'dialog' },
          icon('keys'),
          h('span', {}, t('shortcuts')),
        ),
      ),
    );
    this.entries.addEventListener(
      'toggle',
      (event) => {
        if (event.newState === 'closed' && this.isStale) this.renew();
      },
      true,
    );
    this.heard = [chats.on('list', () => this.renew())];
    this.list = [];
    this.renew();
  }

  // Not below the hands of somebody who has a menu open, or writes a title.
  async renew() {
    this.list = await store.list();
    this.isStale = Boolean(this.entries.querySelector(':popover-open, .rename'));
    if (!this.isStale) this.draw();
  }

  draw() {
    const wanted = this.search.value.trim().toLowerCase();
    const shown = this.list.filter((entry) => titleOf(entry, t('untitled')).toLowerCase().includes(wanted));
    const groups = new Map();
    for (const entry of shown) {
      const name = age(entry.updated);
      groups.set(name, [...(groups.get(name) ?? []), entry]);
    }
    const lists = [...groups].map(([name, entries]) =>
      h(
        'section',
        {},
        h('h2', {}, t(name)),
        h(
          'ul',
          {},
          entries.map((entry) => this.line(entry)),
        ),
      ),
    );
    this.entries.replaceChildren(
      ...(lists.length ? lists : [h('p', { class: 'quiet' }, t(wanted ? 'nothingFound' : 'nothingYet'))]),
    );
    this.mark();
  }

  line(entry) {
    const title = titleOf(entry, t('untitled'));
    const link = h(
      'a',
      { href: address(entry), title },
      entry.kind === 'compare' && icon('compare'),
      h('span', {}, title),
    );
    const item = h(
      'li',
      { 'data-id': entry.id },
      link,
      menuButton(t('actionsFor', { title }), () => [
        [t('rename'), () => this.rename(entry, item)],
        [t('exportOne'), () => this.export(entry)],
        [t('delete'), () => this.delete(entry)],
      ]),
    );
    return item;
  }

  mark() {
    const { id, way } = this.current();
    for (const item of this.entries.querySelectorAll('li')) setCurrent(item.querySelector('a'), item.dataset.id === id);
    for (const link of this.element.querySelectorAll('[data-way]')) setCurrent(link, link.dataset.way === way);
  }

  rename(entry, item) {
    const field = h('input', { type: 'text', class: 'rename', value: entry.title, 'aria-label': t('rename') });
    let over = false;
    const end = async (keep) => {
      if (over) return;
      over = true;
      const title = field.value.trim();
      field.remove();
      if (keep && title) await this.retitle(entry.id, title);
      this.renew();
    };
    field.addEventListener('keydown', (event) => {
      if (event.isComposing || event.keyCode === 229) return;
      if (event.key === 'Enter') end(true);
      if (event.key === 'Escape') {
        event.stopPropagation();
        end(false);
      }
    });
    field.addEventListener('blur', () => end(true));
    item.replaceChildren(field);
    field.select();
  }

  async retitle(id, title) {
    const record = await chats.open(id);
    record.title = title;
    await store.save(record);
  }

  async export(entry) {
    download(
      `${titleOf(entry, 'conversation')
        .replace(/[^\p{L}\p{N}]+/gu, '-')
        .slice(0, 40)}.json`,
      exported([await chats.open(entry.id)]),
    );
  }

  async delete(entry) {
    const record = await chats.open(entry.id);
    chats.forget(entry.id);
    await store.remove(entry.id);
    await this.renew();
    if (this.current().id === entry.id) this.go('#/');
    const undo = async () => {
      await store.save(chats.adopt(record));
      this.renew();
    };
    note(t('deleted', { title: titleOf(entry, t('untitled')) }), { action: [t('undo'), undo] });
  }

  close() {
    this.heard.forEach((stop) => stop());
  }
}

export function address({ id, kind }) {
  return `#/${kind === 'compare' ? 'compare' : 'c'}/${id}`;
}

function brandMark() {
  return h('img', { src: new URL('../../icon.svg', import.meta.url).href, alt: '', width: 24, height: 24 });
}

function setCurrent(link, isCurrent) {
  if (isCurrent) link.setAttribute('aria-current', 'page');
  else link.removeAttribute('aria-current');
}

function age(time) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (time >= today) return 'today';
  if (time >= today - DAY_MS) return 'yesterday';
  return time >= today - 7 * DAY_MS ? 'thisWeek' : 'earlier';
}
