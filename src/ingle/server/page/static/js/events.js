// Server-sent events: the data of each, as they come, whatever the pieces are in which the bytes arrive.

export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let left = '';
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      left += value;
      const lines = left.split(/\r\n|\n|\r(?!$)/);
      left = lines.pop();
      for (const line of lines) {
        if (line.startsWith('data:')) data.push(line.slice(line[5] === ' ' ? 6 : 5));
        else if (line === '' && data.length) {
          yield data.join('\n');
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
