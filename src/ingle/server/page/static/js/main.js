// The page: a bar at the side, and beside it a conversation, a comparison or the status, by what the address says.

import { announce, installAnnouncements, note } from './announce.js';
import { onKeyWanted } from './api.js';
import * as chats from './chats.js';
import { newComparison, newConversation } from './conversation.js';
import { h, iconButton } from './dom.js';
import { findModels, models, onModels } from './models.js';
import { read, write } from './prefs.js';
import * as store from './store.js';
import { applyTheme } from './theme.js';
import { applyLanguage, t } from './words.js';
import { ChatView } from './views/chat.js';
import { CompareView } from './views/compare.js';
import { showHelp } from './views/help.js';
import { askKey } from './views/key.js';
import { showPreferences } from './views/preferences.js';
import { address, Sidebar } from './views/sidebar.js';
import { StatusView } from './views/status.js';

const READ_OUT = 1500; // characters of an answer that a screen reader is handed when it is whole
const narrow = matchMedia('(max-width: 760px)');
const app = document.getElementById('app');
const banner = h('p', { class: 'banner', role: 'status' });
let sidebar = null;
let view = null;
let here = { way: 'newChat', id: null };

function route() {
  const [, way = '', id = null] = location.hash.split('/');
  return { way, id };
}

function go(hash) {
  if (location.hash === hash || (hash === '#/' && !location.hash)) show();
  else location.hash = hash;
}

async function show() {
  const { way, id } = route();
  const lead = () => iconButton('menu', t('showSidebar'), () => showSidebar(true), { class: 'icon-button lead' });
  const opened = (record) => {
    here = { way: null, id: record.id };
    history.replaceState(null, '', address(record));
    sidebar.renew();
  };
  let next;
  if (way === 'status') next = [() => new StatusView({ lead }), { way: 'status', id: null }];
  else if (way === 'compare') {
    const record = (id && (await chats.open(id))) || newComparison([chats.lastSettings(), chats.lastSettings()]);
    next = [() => new CompareView(record, { lead, opened }), { way: id ? null : 'compare', id }];
  } else {
    const record = (way === 'c' && id && (await chats.open(id))) || newConversation(chats.lastSettings());
    if (id && record.id !== id) history.replaceState(null, '', '#/');
    next = [
      () => new ChatView(record, { lead, opened }),
      { way: record.id === id ? null : 'newChat', id: record.id === id ? id : null },
    ];
  }
  view?.close();
  here = next[1];
  const made = next[0]();
  if (view) view.element.replaceWith(made.element);
  else app.append(made.element);
  view = made;
  made.element.prepend(banner);
  sidebar.mark();
  if (narrow.matches) showSidebar(false, { keep: false });
  else view.focus();
}

function showSidebar(shown, { keep = true } = {}) {
  app.classList.toggle('with-sidebar', shown);
  if (keep && !narrow.matches) write('sidebar', shown);
  if (!keep) return;
  if (shown) sidebar.search.focus();
  else app.querySelector('.lead')?.focus();
}

function mount() {
  view?.close();
  sidebar?.close();
  view = null;
  sidebar = new Sidebar({ go, current: () => here, close: () => showSidebar(false), preferences, help: showHelp });
  const skip = h(
    'a',
    {
      class: 'skip',
      href: '#main',
      onclick: (event) => {
        event.preventDefault();
        view.focus();
      },
    },
    t('skip'),
  );
  const veil = h('div', { class: 'veil', onclick: () => showSidebar(false) });
  app.replaceChildren(skip, sidebar.element, veil);
  drawBanner();
  return show();
}

function preferences() {
  showPreferences({
    redraw: mount,
    cleared: () => {
      sidebar.renew();
      go('#/');
    },
  });
}

function drawBanner() {
  const { state, loading } = models;
  banner.hidden = state === 'ready' || state === 'asking';
  if (state === 'loading') {
    const percent = loading?.percent;
    const share = percent === null || percent === undefined ? '' : `(${percent} %)`;
    banner.textContent = `${t('loadingModel')} ${loading?.stage ?? ''} ${share}`;
  } else if (state === 'unreachable') banner.textContent = t('unreachable');
  else if (state === 'failed') banner.textContent = loading.detail;
  else if (state === 'locked') {
    banner.replaceChildren(
      t('keyNeeded'),
      ' ',
      h('button', { type: 'button', class: 'text-button', onclick: () => findModels() }, t('giveKey')),
    );
  }
}

function keyTyped(event) {
  if (event.isComposing || event.keyCode === 229 || event.altKey) return;
  const command = event.ctrlKey || event.metaKey;
  const act =
    command && event.shiftKey
      ? WITH_SHIFT[event.code]
      : command
        ? WITH_COMMAND[event.key]
        : event.key === 'Escape'
          ? escaped
          : null;
  if (!act || act(event) === false) return;
  event.preventDefault();
}

const WITH_SHIFT = {
  KeyO: () => {
    go('#/');
    view.focus();
  },
  KeyS: () => showSidebar(!app.classList.contains('with-sidebar')),
  Semicolon: async () => announce(t((await view.copyLast?.()) ? 'copied' : 'notCopied')),
};
const WITH_COMMAND = { '/': showHelp, k: () => showSidebar(true), ',': () => view.settings?.() };

function escaped(event) {
  if (document.querySelector('dialog[open], [popover]:popover-open')) return false;
  if (event.shiftKey) return view.focus();
  if (narrow.matches && app.classList.contains('with-sidebar')) return showSidebar(false);
  return view.isBusy() ? view.stop() : false;
}

// Where a keyboard covers the page without making it smaller, as on iPhones.
function followKeyboard() {
  const seen = window.visualViewport;
  if (!seen) return;
  const fit = () => document.documentElement.style.setProperty('--height', `${Math.round(seen.height)}px`);
  seen.addEventListener('resize', fit);
  fit();
}

function readOut({ node }) {
  if (node.error) announce(t('answerFailed'));
  else announce(`${t('answerDone')} ${node.content.slice(0, READ_OUT)}`);
}

applyTheme();
applyLanguage();
installAnnouncements();
followKeyboard();
onKeyWanted(askKey);
onModels(drawBanner);
store.onTrouble((name) => note(t(name), { kind: 'bad' }));
store.onOtherTab(() => sidebar.renew());
chats.on('ended', readOut);
chats.on('running', (conversation) => {
  if (chats.isRunning(conversation)) announce(t('answers'));
});
addEventListener('hashchange', show);
addEventListener('keydown', keyTyped);
addEventListener('pagehide', chats.leave);
addEventListener('pageshow', ({ persisted }) => {
  if (persisted) chats.rescue({ slept: true });
});
document.addEventListener('visibilitychange', () => {
  if (document.hidden) chats.flush();
});
if (!narrow.matches && read('sidebar', true)) app.classList.add('with-sidebar');
await chats.rescue();
await mount();
findModels();
