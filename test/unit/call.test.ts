import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { Wait } from '../../src/call.ts';
import { Refusal } from '../../src/password/errors.ts';

const soon = () => performance.now() + 60_000;
const past = () => performance.now() - 1;

test('somebody waits until the deadline', () => {
  const wait = new Wait(new AbortController().signal, soon());
  wait.throwIfOver();
  assert.ok(wait.remainingMs() > 50_000 && wait.remainingMs() <= 60_000);
});

test('after the deadline nobody waits, whether a timer has told so or not', () => {
  assert.throws(() => new Wait(new AbortController().signal, past()).throwIfOver(), {
    reason: 'DEADLINE_EXCEEDED',
  });
  assert.throws(() => new Wait(AbortSignal.abort(), past()).throwIfOver(), { reason: 'DEADLINE_EXCEEDED' });
});

test('who goes away before the deadline has cancelled', () => {
  assert.throws(() => new Wait(AbortSignal.abort(), soon()).throwIfOver(), { reason: 'CANCELLED' });
  assert.throws(() => new Wait(AbortSignal.abort('whatever'), soon()).throwIfOver(), { reason: 'CANCELLED' });
});

test('a signal that was aborted with a refusal tells that one', () => {
  for (const reason of ['DEADLINE_EXCEEDED', 'CANCELLED'] as const) {
    assert.throws(() => new Wait(AbortSignal.abort(new Refusal(reason)), soon()).throwIfOver(), { reason });
  }
});

test('a wait of so many milliseconds is over after them, and says that they have passed', async () => {
  const wait = Wait.forMs(30);
  wait.throwIfOver();
  await new Promise((resolve) => wait.signal.addEventListener('abort', resolve));
  assert.throws(() => wait.throwIfOver(), { reason: 'DEADLINE_EXCEEDED' });
});

test('time is booked under its phase, for work that fails as well, and adds up', async () => {
  const wait = Wait.forMs(60_000);
  assert.equal(await wait.timed('hash', () => sleep(15, 'made')), 'made');
  const once = wait.spent.hash;
  assert.ok(once >= 10);
  await assert.rejects(
    wait.timed('hash', async () => {
      await sleep(15);
      throw new Error('failed');
    }),
    /failed/,
  );
  assert.ok(wait.spent.hash >= once + 10);
  assert.deepEqual([wait.spent.queue, wait.spent.database], [0, 0]);
});
