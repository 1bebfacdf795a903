import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { parse } from 'smol-toml';
import { configKeys, loadConfig } from '../../src/config.ts';

const path = fileURLToPath(new URL('../../rekey.example.toml', import.meta.url));
const example = new Map(leaves(parse(readFileSync(path, 'utf8'))));

function leaves(tree: object, prefix = ''): [string, unknown][] {
  return Object.entries(tree).flatMap(([name, value]) =>
    typeof value === 'object' && !Array.isArray(value)
      ? leaves(value, `${prefix}${name}.`)
      : [[prefix + name, value] as [string, unknown]],
  );
}

test('the example configuration holds every key and no other', () => {
  assert.deepEqual([...example.keys()].sort(), [...configKeys.keys()].sort());
});

test('the example configuration holds every default as it is, and examples of what is required', () => {
  const required: string[] = [];
  for (const [key, type] of configKeys) {
    const fallback = type.safeParse(undefined);
    if (fallback.success) assert.deepEqual(example.get(key), fallback.data, key);
    else required.push(key);
  }
  assert.deepEqual(required.sort(), ['apps', 'database.url']);
});

test('the example configuration loads as it stands', () => {
  const { apps, database } = loadConfig(path, {});
  assert.deepEqual(
    loadConfig(path, {}),
    loadConfig(undefined, { REKEY_APPS: apps.join(','), REKEY_DATABASE_URL: database.url }),
  );
});

test('the example configuration explains every key or group of keys', () => {
  const blocks = readFileSync(path, 'utf8').split(/\n\n/);
  for (const block of blocks.filter((text) => /^\w+ = /m.test(text))) {
    assert.match(block, /^(\[\w+\]\n)?# \S/, block);
  }
});
