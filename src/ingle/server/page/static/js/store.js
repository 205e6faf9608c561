// Conversations, in the browser's IndexedDB: what is listed apart from what is opened. Where there is no such database
// they last as long as the page, and `onTrouble` hears why.

const NAME = 'ingle';
let opening = null;
let memory = null;
let trouble = () => {};

export function onTrouble(listener) {
  trouble = listener;
}

function database() {
  opening ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore('list', { keyPath: 'id' });
      request.result.createObjectStore('bodies', { keyPath: 'id' });
    };
    request.onsuccess = () => {
      request.result.onversionchange = () => request.result.close();
      resolve(request.result);
    };
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error('blocked by another tab'));
  }).catch((error) => {
    memory = new Map();
    trouble('storageNone', error);
    return null;
  });
  return opening;
}

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function read(store, act) {
  const opened = await database();
  return done(act(opened.transaction(store).objectStore(store)));
}

async function write(act) {
  const opened = await database();
  const transaction = opened.transaction(['list', 'bodies'], 'readwrite');
  act(transaction.objectStore('list'), transaction.objectStore('bodies'));
  await new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

function entry({ id, kind, title, created, updated }) {
  return { id, kind, title, created, updated };
}

// The newest first.
export async function list() {
  await database();
  const found = memory ? [...memory.values()].map(entry) : await read('list', (store) => store.getAll());
  return found.sort((one, other) => other.updated - one.updated);
}

export async function load(id) {
  await database();
  return memory ? memory.get(id) : read('bodies', (store) => store.get(id));
}

export async function all() {
  await database();
  return memory ? [...memory.values()] : read('bodies', (store) => store.getAll());
}

// False where there was no room, which `onTrouble` has heard.
export async function save(conversation) {
  await database();
  const copy = structuredClone(conversation);
  if (memory) {
    memory.set(copy.id, copy);
    return true;
  }
  try {
    await write((entries, bodies) => {
      entries.put(entry(copy));
      bodies.put(copy);
    });
    told('saved', copy.id);
    return true;
  } catch (error) {
    trouble(error?.name === 'QuotaExceededError' ? 'storageFull' : 'storageFailed', error);
    return false;
  }
}

export async function remove(id) {
  await database();
  if (memory) memory.delete(id);
  else
    await write((entries, bodies) => {
      entries.delete(id);
      bodies.delete(id);
    });
  told('removed', id);
}

export async function clear() {
  await database();
  if (memory) memory.clear();
  else
    await write((entries, bodies) => {
      entries.clear();
      bodies.clear();
    });
  told('cleared', null);
}

export async function used() {
  try {
    const { usage, quota } = await navigator.storage.estimate();
    return { usage, quota };
  } catch {
    return null;
  }
}

// Other tabs of the same page.
const channel = typeof BroadcastChannel === 'undefined' ? null : new BroadcastChannel(NAME);

function told(what, id) {
  channel?.postMessage({ what, id });
}

export function onOtherTab(listener) {
  channel?.addEventListener('message', (event) => listener(event.data));
}
