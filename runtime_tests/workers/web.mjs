// Open a file in onnxruntime-web (wasm) and run batches: the protocol of runtime_tests/ort/worker.py, for node.
//
//     node web.mjs NODE_MODULES FOLDER
//
// Must not know: the project.

import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { pathToFileURL } from 'node:url';

console.log = console.info = console.warn = console.error; // standard output carries answers only

const [modules, folder] = process.argv.slice(2);
const ort = await import(pathToFileURL(join(modules, 'onnxruntime-web', 'dist', 'ort.node.min.mjs')).href);

const KINDS = {
  float32: ['<f4', Float32Array], float64: ['<f8', Float64Array], uint8: ['|u1', Uint8Array], int8: ['|i1', Int8Array],
  uint16: ['<u2', Uint16Array], int16: ['<i2', Int16Array], uint32: ['<u4', Uint32Array], int32: ['<i4', Int32Array],
  uint64: ['<u8', BigUint64Array], int64: ['<i8', BigInt64Array], bool: ['|b1', Uint8Array],
};

// https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
function readNpy(path) {
  const bytes = readFileSync(path);
  const start = bytes[6] === 1 ? 10 + bytes.readUInt16LE(8) : 12 + bytes.readUInt32LE(8);
  const header = bytes.toString('latin1', 10, start);
  const [, descr] = header.match(/'descr': '([^']+)'/);
  const shape = header.match(/'shape': \(([^)]*)\)/)[1].split(',').filter(text => text.trim()).map(Number);
  const found = Object.entries(KINDS).find(([, [code]]) => code === descr);
  if (!found) throw new Error(`inputs of type ${descr} cannot be passed to onnxruntime-web`);
  const [kind, [, Values]] = found;
  return new ort.Tensor(kind, new Values(bytes.buffer.slice(bytes.byteOffset + start, bytes.byteOffset + bytes.length)), shape);
}

function writeNpy(path, tensor) {
  if (!KINDS[tensor.type]) throw new Error(`onnxruntime-web returned the type ${tensor.type}`);
  const shape = tensor.dims.length === 1 ? `${tensor.dims[0]},` : tensor.dims.join(', ');
  const text = `{'descr': '${KINDS[tensor.type][0]}', 'fortran_order': False, 'shape': (${shape}), }`;
  const header = text.padEnd(Math.ceil((text.length + 11) / 64) * 64 - 11) + '\n';
  const start = Buffer.from([0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59, 1, 0, header.length & 255, header.length >> 8]);
  const { buffer, byteOffset, byteLength } = tensor.data;
  writeFileSync(path, Buffer.concat([start, Buffer.from(header, 'latin1'), Buffer.from(buffer, byteOffset, byteLength)]));
}

// {"session.name": "1"} -> {session: {name: "1"}}
function nested(entries) {
  const result = {};
  for (const [key, value] of Object.entries(entries)) {
    const names = key.split('.');
    const last = names.pop();
    names.reduce((here, name) => (here[name] ??= {}), result)[last] = value;
  }
  return result;
}

let session, names;

async function answer(request) {
  if (!session) {
    names = request;
    ort.env.wasm.numThreads = request.threads;
    ort.env.logLevel = 'error';
    session = await ort.InferenceSession.create(readFileSync(join(folder, request.model)), {
      executionProviders: ['wasm'], graphOptimizationLevel: 'all', executionMode: 'sequential',
      logSeverityLevel: 3, extra: nested(request.entries),
    });
    return { version: ort.env.versions.web };
  }
  const feeds = Object.fromEntries(names.inputs.map((name, index) => [name, readNpy(join(folder, `in_${index}.npy`))]));
  const found = await session.run(feeds, names.outputs);
  names.outputs.forEach((name, index) => writeNpy(join(folder, `out_${index}.npy`), found[name]));
  return {};
}

for await (const line of createInterface({ input: process.stdin })) {
  let reply;
  try {
    reply = await answer(JSON.parse(line));
  } catch (error) {
    reply = { error: `${error?.message ?? error}` };
  }
  process.stdout.write(JSON.stringify(reply) + '\n');
}
process.exit(0);
