// node lay_out.mjs REPORTS.json
//
// Puts reports of a run together as the pipeline panel does, lays the run out on 100 pixels of real time and 50 of the
// ideal, and prints what came out as one JSON object. It judges nothing: that is test_monitor_panel.py's part.

import { readFileSync } from 'node:fs'
import { boxes, decoding, idealRate, merge, rows, seconds, ticks, tiles } from '../../../web/strip.mjs'

const run = JSON.parse(readFileSync(process.argv[2])).reduce(merge, null)
const lines = rows(run.places.length + 1, 60)
const from = run.now - 10
const brief = (box) => [box.span.stage, box.span.block, Math.round(box.left), Math.round(box.width), box.top, box.height]
console.log(
  JSON.stringify({
    spans: run.spans.length,
    plan: run.plan,
    seconds: seconds(run),
    rate: idealRate(run),
    decoding: decoding(run.spans, from, run.now),
    real: boxes(run.spans, { from, to: run.now, left: 0, width: 100, lines }).map(brief),
    ideal: boxes(tiles(run, 5), { from: 0, to: 5, left: 0, width: 50, lines }).map(brief),
    ticks: ticks(from, run.now),
  }),
)
