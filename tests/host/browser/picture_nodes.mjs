// node picture_nodes.mjs URL FOLDER LANGUAGE...
//
// Makes the pictures of the help pages, FOLDER/<language>/<node>.jpg: builds one graph of all nodes, makes a video with
// the demo model, and photographs each node as it is afterwards. The Memory Plan looks at the files named below.

import { join } from 'node:path'
import { openPage } from './page.mjs'
import { reopen } from './settings.mjs'

const [url, folder, ...languages] = process.argv.slice(2)
const MARGIN = 40
const QUALITY = 85 // of a JPEG

const RUN = ['decode', 'line', 'plan', 'evaluate'] // and what they need
// Name: [type, column, row, widgets, inputs as "socket": "name.output"]
const GRAPH = {
  demo: ['LiveAvatar_DemoLoader', 0, 0],
  picture: ['LoadImage', 0, 1, { image: 'portrait.png' }],
  sound: ['LoadAudio', 0, 2, { audio: 'speech.wav' }],
  preset: ['LiveAvatar_Preset', 1, 0, { preset: 0 }],
  image: ['LiveAvatar_ImageLoader', 1, 1, {}, { image: 'picture.IMAGE', size: 'preset.size' }],
  little: ['LiveAvatar_ImageLoader', 1, 5, { width: 96, height: 64 }, { image: 'picture.IMAGE' }], // in its place
  speech: ['LiveAvatar_AudioEncoder', 1, 2, {}, { audio: 'sound.AUDIO', audio_encoder: 'demo.audio_encoder', seconds: 'preset.seconds' }],
  prompt: ['LiveAvatar_PromptConditioner', 1, 3,
    { text: 'A friendly woman with brown hair', style: 'Pixar style', lighting: 'soft studio lighting', action: 'smiling warmly' },
    { clip: 'demo.clip' }],
  sampler: ['LiveAvatar_Sampler', 2, 0, {},
    { model: 'demo.model', positive: 'prompt.positive', image: 'little.image', vae: 'demo.vae', speech: 'speech.speech', steps: 'preset.steps' }],
  decode: ['LiveAvatar_Decode', 3, 0, {}, { stream: 'sampler.stream', vae: 'demo.vae' }],
  frames: ['LiveAvatar_DecodeFrames', 3, 1, {}, { stream: 'sampler.stream', vae: 'demo.vae' }],
  save: ['CreateVideo', 4, 1, {}, { images: 'frames.images', audio: 'frames.audio', fps: 'frames.fps' }],
  line: ['LiveAvatar_TimeLine', 4, 0, {}, { stream: 'sampler.stream', after: 'decode.video' }],
  evaluate: ['LiveAvatar_Evaluate', 4, 3, { mouth: '40, 36, 56, 48' }, { video: 'decode.video', image: 'little.image' }],
  unload: ['LiveAvatar_Unload', 4, 2, {}, { after: 'decode.video' }],
  bench: ['LiveAvatar_Benchmark', 3, 2, { size: '384*256', blocks: 13 }, { model: 'demo.model', vae: 'demo.vae', audio_encoder: 'demo.audio_encoder' }],
  loader: ['LiveAvatar_ModelLoader', 0, 4, { model_name: 'wan2.2_s2v_14B_bf16.safetensors', lora_name: 'liveavatar.safetensors' }],
  runtime: ['LiveAvatar_Runtime', 0, 5, { devices: 'cuda:0', precision: 'fp8' }],
  plan: ['LiveAvatar_MemoryPlan', 1, 4, {}, { model: 'loader.model', runtime: 'runtime.runtime', image: 'image.image' }],
  convert: ['LiveAvatar_ConvertAndSave', 2, 4, { filename: 'pictures/live_avatar_demo_fp8' }, { model: 'demo.model' }],
}

const { page, close } = await openPage(url, { viewport: { width: 1400, height: 1400 } })
for (const language of languages) {
  await reopen(page, { 'Comfy.Locale': language, 'Comfy.VueNodes.Enabled': false })
  await build()
  await fetch(`${url}/free`, { method: 'POST', body: '{"free_memory": true}' }) // what is cached shows nothing new
  await run()
  for (const [name, [type]] of Object.entries(GRAPH)) if (type.startsWith('LiveAvatar_') && name !== 'little') await picture(name, language)
}
await close()

async function build() {
  await page.evaluate((graph) => {
    app.graph.clear()
    window.made = {}
    for (const [name, [type, column, row, widgets = {}, inputs = {}]] of Object.entries(graph)) {
      const node = (made[name] = LiteGraph.createNode(type))
      app.graph.add(node)
      node.pos = [column * 700, row * 900]
      node.size[0] = 400
      if (name === 'sampler') node.widgets.find((widget) => widget.name === 'seed').value = Math.floor(Math.random() * 1000)
      for (const [widget, value] of Object.entries(widgets)) {
        const { options } = node.widgets.find((other) => other.name === widget)
        node.widgets.find((other) => other.name === widget).value = typeof value === 'number' && options.values ? options.values[value] : value
      }
      for (const [socket, from] of Object.entries(inputs)) {
        const [source, output] = from.split('.')
        made[source].connect(made[source].findOutputSlot(output), node, socket)
      }
    }
  }, GRAPH)
}

async function run() {
  const [answer] = await Promise.all([
    page.waitForResponse((response) => response.url().endsWith('/prompt') && response.request().method() === 'POST'),
    page.evaluate((names) => app.queuePrompt(0, 1, names.map((name) => String(made[name].id))), RUN),
  ])
  const { prompt_id, node_errors } = await answer.json()
  if (Object.keys(node_errors).length) throw new Error(JSON.stringify(node_errors))
  for (;;) {
    const entry = (await (await fetch(`${url}/history/${prompt_id}`)).json())[prompt_id]
    if (entry?.status.status_str === 'success') return
    if (entry) throw new Error(JSON.stringify(entry.status.messages))
    await page.waitForTimeout(500)
  }
}

async function picture(name, language) {
  const clip = await page.evaluate(async ([name, margin]) => {
    const node = made[name]
    const title = LiteGraph.NODE_TITLE_HEIGHT
    app.canvas.ds.scale = 1
    app.canvas.ds.offset = [300 - node.pos[0], 200 - node.pos[1]]
    app.canvas.setDirty(true, true)
    await new Promise((done) => setTimeout(done, 700)) // widgets that are elements follow
    const canvas = app.canvas.canvas.getBoundingClientRect()
    return {
      x: canvas.x + 300 - margin,
      y: canvas.y + 200 - title - margin,
      width: node.size[0] + 2 * margin,
      height: node.size[1] + title + 2 * margin,
    }
  }, [name, MARGIN])
  const path = join(folder, language, `${GRAPH[name][0]}.jpg`)
  await page.screenshot({ path, clip, type: 'jpeg', quality: QUALITY })
}
