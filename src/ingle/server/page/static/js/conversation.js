// A conversation is a tree of messages: what is asked or answered anew becomes a sibling, and nothing is lost. The leaf
// says which branch is shown. All here are functions of plain values, as they are kept and exported.

export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');
}

export function newConversation(settings) {
  const now = Date.now();
  return {
    id: newId(),
    kind: 'chat',
    title: '',
    created: now,
    updated: now,
    settings: { ...settings },
    nodes: {},
    leaf: null,
  };
}

export function newComparison(settings) {
  const { id, created, updated } = newConversation({});
  return { id, kind: 'compare', title: '', created, updated, lanes: settings.map((each) => newConversation(each)) };
}

export function add(conversation, parent, message) {
  const node = { id: newId(), parent, created: Date.now(), ...message };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  conversation.updated = Date.now();
  return node;
}

// From the first message to the leaf.
export function branch(conversation, leaf = conversation.leaf) {
  const found = [];
  for (let node = conversation.nodes[leaf]; node; node = conversation.nodes[node.parent]) found.unshift(node);
  return found;
}

export function children(conversation, parent) {
  return Object.values(conversation.nodes)
    .filter((node) => node.parent === parent)
    .sort((one, other) => one.created - other.created || (one.id < other.id ? -1 : 1));
}

export function siblings(conversation, node) {
  return children(conversation, node.parent);
}

// Shows the branch through `node` which was written to last.
export function choose(conversation, node) {
  let leaf = node;
  for (let below = children(conversation, leaf.id); below.length; below = children(conversation, leaf.id))
    leaf = below.at(-1);
  conversation.leaf = leaf.id;
}

export function titleOf(conversation, untitled) {
  return conversation.title || untitled;
}

const TITLE_CHARACTERS = 60;

export function titleFrom(text) {
  const line = text
    .trim()
    .split('\n')[0]
    .replace(/[#*`>]/g, '')
    .trim();
  const characters = [...line];
  return characters.length > TITLE_CHARACTERS ? `${characters.slice(0, TITLE_CHARACTERS - 1).join('')}…` : line;
}
