// node watch_panel.mjs URL WORKFLOW.json SHOTS SEED SECONDS DEVICES
//
// Opens the pipeline panel and runs a small form of the workflow with a stage on each of DEVICES: paused, resumed and
// seen to its end; then another one, which is stopped. Prints what was seen as one JSON object and judges nothing: that is
// test_monitor_panel.py's part.

import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { openPage } from './page.mjs'

const [url, file, shots, seed, seconds, devices] = process.argv.slice(2)
const WAIT = { timeout: 200_000 }
const { page, problems, close } = await openPage(url)
const shoot = (moment) => page.screenshot({ path: join(shots, `panel-${moment}.png`) })

await page.evaluate(async ([workflow, seed, seconds, devices]) => {
  await app.loadGraphData(workflow, true, true, 'panel')
  const runtime = LiteGraph.createNode('LiveAvatar_Runtime')
  app.graph.add(runtime)
  const sampler = app.graph.nodes.find((node) => node.type === 'LiveAvatar_Sampler')
  runtime.connect(0, sampler, sampler.inputs.findIndex((input) => input.name === 'runtime'))
  const small = {
    LiveAvatar_ImageLoader: { width: 96, height: 64 },
    LiveAvatar_AudioEncoder: { seconds: Number(seconds) },
    LiveAvatar_Sampler: { seed: Number(seed) },
    LiveAvatar_Runtime: { devices, plan: 'ring' },
  }
  for (const node of app.graph.nodes)
    for (const widget of node.widgets ?? []) widget.value = small[node.type]?.[widget.name] ?? widget.value
  await app.extensionManager.command.execute('Workspace.ToggleBottomPanelTab.liveavatar-pipeline')
}, [JSON.parse(readFileSync(file, 'utf8')), seed, seconds, devices])
const panel = page.locator('.liveavatar-monitor')
await panel.waitFor(WAIT)
const before = await text()
await shoot('before')

await page.evaluate(() => app.queuePrompt(0))
await press('pause', 'Go on')
await page.waitForFunction(() => /paused .* [1-9]\d* of/.test(document.querySelector('.liveavatar-monitor').innerText), null, WAIT)
const real = await bands(0.2, 0.75)
const paused = await settled()
await shoot('paused')
await press('resume', 'Pause')
await ended()
const done = await text()
const ideal = await bands(0.8, 1)
await shoot('done')
await theme('light')
await shoot('light')

await page.evaluate(() => {
  const sampler = app.graph.nodes.find((node) => node.type === 'LiveAvatar_Sampler')
  sampler.widgets.find((widget) => widget.name === 'seed').value++
  const speech = app.graph.nodes.find((node) => node.type === 'LiveAvatar_AudioEncoder')
  speech.widgets.find((widget) => widget.name === 'seconds').value = 0 // all of it: time to stop it in
  delete app.nodeOutputs[app.graph.nodes.find((node) => node.type === 'LiveAvatar_Decode').id]
  return app.queuePrompt(0)
})
await press('stop')
await ended()
const stopped = { text: await text(), video: await playFile() }
await shoot('stopped')
await theme('dark')
await close()
console.log(JSON.stringify({ before, paused, real, done, ideal, stopped, problems }))

function text() {
  return panel.innerText()
}

/** What the panel says once it says nothing else for a while. */
async function settled() {
  for (let before; ; ) {
    before = await text()
    await page.waitForTimeout(2000)
    if ((await text()) === before) return before
  }
}

/** One of the panel's buttons, by its words; `then` is what the same one says afterwards. */
async function press(action, then) {
  const words = { pause: 'Pause making', resume: 'Go on', stop: 'Stop after' }
  await panel.locator(`button[title^="${words[action]}"]`).click(WAIT)
  if (then) await panel.locator(`button[title^="${then}"]`).waitFor(WAIT)
}

async function ended() {
  await page.waitForFunction(() => /^(done|stopped|ended)/.test(document.querySelector('.liveavatar-monitor').innerText), null, WAIT)
  await page.waitForFunction(() => app.nodeOutputs[app.graph.nodes.find((node) => node.type === 'LiveAvatar_Decode').id], null, WAIT)
}

/** How many rows of the panel's picture have boxes, between two shares of its width. */
function bands(from, to) {
  return page.evaluate(([from, to]) => {
    const { width, height } = document.querySelector('.liveavatar-monitor canvas')
    const brush = document.querySelector('.liveavatar-monitor canvas').getContext('2d')
    const left = Math.round(from * width)
    const columns = Math.round(to * width) - left
    const { data } = brush.getImageData(left, 0, columns, height)
    const coloured = (row) => {
      for (let at = 4 * row * columns; at < 4 * (row + 1) * columns; at += 4)
        if (Math.max(...data.slice(at, at + 3)) - Math.min(...data.slice(at, at + 3)) > 30) return true // no grey
      return false
    }
    let found = 0
    for (let row = 1; row < height; row++) found += coloured(row) && !coloured(row - 1)
    return found
  }, [from, to])
}

/** The decode node's finished file, played to its end: its length and the size of its picture. */
function playFile() {
  return page.evaluate(async () => {
    const decode = app.graph.nodes.find((node) => node.type === 'LiveAvatar_Decode')
    const [{ filename, subfolder, type }] = app.nodeOutputs[decode.id].images
    const video = document.createElement('video')
    video.muted = true
    video.src = `/view?${new URLSearchParams({ filename, subfolder, type })}`
    await Promise.all([video.play(), new Promise((done) => (video.onended = done))])
    return { duration: video.duration, size: [video.videoWidth, video.videoHeight] }
  })
}

function theme(name) {
  return page.evaluate((name) => app.extensionManager.setting.set('Comfy.ColorPalette', name), name)
}
