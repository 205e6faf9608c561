// The `openai` package: openai.mjs URL SCRIPTED_URL MODEL
import assert from 'node:assert/strict'
import OpenAI from 'openai'
import { zodResponseFormat, zodTextFormat } from 'openai/helpers/zod'
import { z } from 'zod'

const [url, scripted, model] = process.argv.slice(2)
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'none', maxRetries: 0 })
const actor = new OpenAI({ baseURL: `${scripted}/v1`, apiKey: 'none', maxRetries: 0 })
const hello = [{ role: 'user', content: 'Say hello.' }]
const degrees = { Paris: '18 degrees', 北京: '7 degrees' }
const Animal = z.object({ kind: z.enum(['cat', 'dog', '鸟']), legs: z.number().int().min(0).max(8) })

// chat, whole and streamed
const whole = await client.chat.completions.create({ model, messages: hello, temperature: 0, max_tokens: 300 })
const stream = client.chat.completions.stream({
  model, messages: hello, temperature: 0, max_tokens: 300, stream_options: { include_usage: true },
})
let told = ''
stream.on('content', delta => { told += delta })
const final = await stream.finalChatCompletion()
assert.equal(told, whole.choices[0].message.content)
assert.equal(final.choices[0].message.content, told)
assert.equal(final.choices[0].finish_reason, whole.choices[0].finish_reason)
assert.equal((await stream.totalUsage()).completion_tokens, whole.usage.completion_tokens)

// parsed
const parsed = await client.chat.completions.parse({
  model, messages: hello, response_format: zodResponseFormat(Animal, 'animal'), temperature: 1,
})
assert.ok(Animal.safeParse(parsed.choices[0].message.parsed).success)

// tools in a loop
const runner = actor.chat.completions.runTools({
  model,
  stream: true,
  messages: [{ role: 'user', content: '[script:both] How warm is it?' }],
  tools: [{
    type: 'function',
    function: {
      name: 'get_weather',
      parse: JSON.parse,
      function: ({ city }) => degrees[city],
      description: 'The weather in a city',
      parameters: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] },
    },
  }],
})
assert.equal(await runner.finalContent(), '18 in Paris, 7 in 北京.')

// responses
const response = await client.responses.create({ model, input: 'Say hello.', temperature: 0, max_output_tokens: 300 })
const responses = client.responses.stream({ model, input: 'Say hello.', temperature: 0, max_output_tokens: 300 })
told = ''
for await (const event of responses) if (event.type === 'response.output_text.delta') told += event.delta
assert.equal((await responses.finalResponse()).output_text, response.output_text)
assert.equal(told, response.output_text)
const typed = await client.responses.parse({ model, input: 'An animal.', text: { format: zodTextFormat(Animal, 'animal') } })
assert.ok(Animal.safeParse(typed.output_parsed).success)

// embeddings: base64 unless it is told otherwise
const short = await client.embeddings.create({ model, input: ['The sea', '海'] })
const plain = await client.embeddings.create({ model, input: ['The sea', '海'], encoding_format: 'float' })
assert.equal(short.data.length, 2)
assert.ok(short.data[1].embedding.every((value, place) => Math.abs(value - plain.data[1].embedding[place]) < 1e-5))

// errors
await assert.rejects(client.chat.completions.create({ model: 'nobody', messages: hello }), error =>
  error instanceof OpenAI.NotFoundError && error.code === 'model_not_found')
await assert.rejects(client.chat.completions.create({ model, messages: hello, temperature: -1 }), error =>
  error instanceof OpenAI.BadRequestError && error.param === 'temperature')

console.log('ok')
