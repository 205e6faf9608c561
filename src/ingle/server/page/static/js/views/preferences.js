// What holds for the page: language, colours, keys, and all conversations as a file.

import { note } from '../announce.js';
import { apiKey, keepKey } from '../api.js';
import * as chats from '../chats.js';
import { dialog, h } from '../dom.js';
import { read, write } from '../prefs.js';
import * as store from '../store.js';
import { setTheme, theme, THEMES } from '../theme.js';
import { exported, imported } from '../transfer.js';
import { bytes, language, LANGUAGES, setLanguage, t } from '../words.js';

const LARGEST_FILE = 200 * 1024 * 1024;

export function showPreferences({ redraw, cleared }) {
  const shown = dialog(t('preferences'), content(), { className: 'sheet', closeLabel: t('close') });

  function content() {
    return h(
      'div',
      { class: 'sheet-body' },
      choice('language', Object.entries(LANGUAGES), language(), (name) => {
        setLanguage(name);
        renewed();
      }),
      choice(
        'theme',
        THEMES.map((name) => [name, t(`theme_${name}`)]),
        theme(),
        setTheme,
      ),
      choice(
        'enter',
        [
          ['send', t('enterSends')],
          ['line', t('enterBreaks')],
        ],
        read('enter', 'send'),
        (name) => {
          write('enter', name);
          redraw();
        },
      ),
      h(
        'section',
        {},
        h('h3', {}, t('conversations')),
        h('p', { class: 'quiet' }, t('keptHere')),
        usage(),
        h(
          'div',
          { class: 'row' },
          button('exportAll', exportAll),
          button('import', () => picked.click()),
          picked,
          button('deleteAll', () => deleteAll(cleared), 'button danger'),
        ),
      ),
      key(),
    );
  }

  function renewed() {
    redraw();
    shown.close();
    showPreferences({ redraw, cleared });
  }

  function key() {
    if (!apiKey()) return null;
    const drop = () => {
      keepKey(null, false);
      note(t('keyForgotten'));
      shown.close();
    };
    return h(
      'section',
      {},
      h('h3', {}, t('apiKey')),
      h('p', { class: 'quiet' }, t('keyKept')),
      button('forgetKey', drop),
    );
  }
  return shown;
}

const picked = h('input', {
  type: 'file',
  accept: '.json,application/json',
  class: 'offscreen',
  tabindex: '-1',
  'aria-hidden': 'true',
  onchange: () => importFile(picked),
});

function button(name, onclick, className = 'button plain') {
  return h('button', { type: 'button', class: className, onclick }, t(name));
}

function choice(name, options, current, choose) {
  return h(
    'fieldset',
    { class: 'choice' },
    h('legend', {}, t(name)),
    options.map(([value, label]) =>
      h(
        'label',
        {},
        h('input', { type: 'radio', name, value, checked: value === current, onchange: () => choose(value) }),
        h('span', {}, label),
      ),
    ),
  );
}

function usage() {
  const line = h('p', { class: 'quiet used' });
  store.used().then((used) => {
    if (used) line.textContent = t('used', { used: bytes(used.usage), quota: bytes(used.quota) });
  });
  return line;
}

export function download(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: 'application/json' }));
  h('a', { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

export async function exportAll() {
  chats.flush();
  download(`ingle-${new Date().toISOString().slice(0, 10)}.json`, exported(await store.all()));
}

async function importFile(input) {
  const [file] = input.files;
  input.value = '';
  if (!file) return;
  try {
    if (file.size > LARGEST_FILE) throw new RangeError(bytes(file.size));
    const found = imported(await file.text());
    for (const record of found) if (!(await store.save(record))) return;
    chats.listChanged();
    note(t('importedCount', { count: found.length }));
  } catch (error) {
    note(t('notImported', { why: error.message }), { kind: 'bad' });
  }
}

async function deleteAll(cleared) {
  const before = await store.all();
  before.forEach((record) => chats.forget(record.id));
  await store.clear();
  cleared();
  const undo = async () => {
    for (const record of before) await store.save(record);
    chats.listChanged();
  };
  note(t('deletedCount', { count: before.length }), { action: [t('undo'), undo] });
}
