import assert from 'node:assert/strict';
import { randomInt } from 'node:crypto';
import { describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { Wait } from '../../src/call.ts';
import { Refusal } from '../../src/password/errors.ts';
import { Slots } from '../../src/password/slots.ts';
import { Random } from '../fault/random.ts';

/** A piece of work that ends when it is told to. */
function work() {
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  let started = false;
  return {
    run: () => {
      started = true;
      return promise;
    },
    finish: () => resolve(),
    fail: () => reject(new Error('failed')),
    get started() {
      return started;
    },
  };
}

function someone(path: readonly [string, string, string], deadlineMs = 60_000, hashes = 1) {
  const controller = new AbortController();
  const wait = new Wait(controller.signal, performance.now() + deadlineMs);
  return { applicant: { path, wait, hashes }, goAway: () => controller.abort() };
}

const anybody = (deadlineMs?: number, hashes?: number) =>
  someone(['app', 'peer', 'user'], deadlineMs, hashes).applicant;

const settle = () => sleep(1);

describe('slots', () => {
  test('no more work is under way than there are slots, and all of it gets done', async () => {
    const slots = new Slots(3, 1000, 0);
    let underWay = 0;
    let most = 0;
    await Promise.all(
      Array.from({ length: 200 }, () =>
        slots.run(anybody(), async () => {
          most = Math.max(most, ++underWay);
          await settle();
          underWay--;
        }),
      ),
    );
    assert.equal(most, 3);
    assert.deepEqual([slots.taken, slots.waiting], [0, 0]);
  });

  test('work that throws gives its slot back and its error on', async () => {
    const slots = new Slots(1, 10, 0);
    await assert.rejects(
      slots.run(anybody(), async () => {
        throw new Error('failed');
      }),
      /failed/,
    );
    assert.equal(await slots.run(anybody(), async () => 'next'), 'next');
    assert.equal(slots.taken, 0);
  });

  test('waiting is booked as waiting', async () => {
    const slots = new Slots(1, 10, 0);
    const first = work();
    const running = slots.run(anybody(), first.run);
    const applicant = anybody();
    const waiting = slots.run(applicant, async () => {});
    await sleep(20);
    first.finish();
    await Promise.all([running, waiting]);
    assert.ok(applicant.wait.spent.queue >= 10, String(applicant.wait.spent.queue));
  });
});

describe('fairness', () => {
  for (const [who, path] of [
    ['user', ['app', 'peer', 'other']],
    ['peer', ['app', 'other', 'user']],
    ['application', ['other', 'peer', 'user']],
  ] as [string, [string, string, string]][]) {
    test(`another ${who} is served next although somebody has flooded the queue`, async () => {
      const slots = new Slots(1, 1000, 0);
      const first = work();
      const order: string[] = [];
      const all = [slots.run(anybody(), first.run)];
      for (let i = 0; i < 500; i++) all.push(slots.run(anybody(), async () => void order.push('flood')));
      all.push(slots.run(someone(path).applicant, async () => void order.push('late')));
      first.finish();
      await Promise.all(all);
      assert.ok(order.indexOf('late') <= 1, String(order.indexOf('late')));
      assert.equal(order.length, 501);
    });
  }

  test('a full queue refuses the newest of whoever floods it, not whoever comes', async () => {
    const slots = new Slots(1, 10, 0);
    const first = work();
    const running = slots.run(anybody(), first.run);
    const flood = Array.from({ length: 10 }, () =>
      slots.run(anybody(), async () => 'served').catch((error: Refusal) => error.reason),
    );
    const late = slots.run(someone(['other', 'peer', 'user']).applicant, async () => 'served');
    assert.equal(slots.waiting, 10);
    assert.equal(await flood.at(-1), 'OVERLOADED');
    first.finish();
    await running;
    assert.equal(await late, 'served');
    assert.deepEqual(await Promise.all(flood.slice(0, -1)), Array(9).fill('served'));
  });

  test('who floods a full queue is refused at once', async () => {
    const slots = new Slots(1, 5, 0);
    const first = work();
    const running = slots.run(anybody(), first.run);
    const flood = Array.from({ length: 1000 }, () =>
      slots.run(anybody(), async () => 'served').catch((error: Refusal) => error.reason),
    );
    assert.equal(slots.waiting, 5);
    const refused = await Promise.all(flood.slice(5));
    assert.deepEqual(new Set(refused), new Set(['OVERLOADED']));
    first.finish();
    await Promise.all([running, ...flood]);
  });
});

describe('deadlines', () => {
  test('who cannot be served in time is told so at once, with a time to come again', async () => {
    const slots = new Slots(2, 1000, 50);
    const busy = [work(), work()];
    const running = busy.map((each) => slots.run(anybody(), each.run));
    const waiting = Array.from({ length: 100 }, () => slots.run(anybody(), async () => {}));
    const start = performance.now();
    await assert.rejects(slots.run(anybody(1000), assert.fail), (error: Refusal) => {
      assert.equal(error.reason, 'OVERLOADED');
      const { retryAfterMs = 0 } = error.details;
      return retryAfterMs >= 100 && retryAfterMs <= 10_000 && Number.isInteger(retryAfterMs);
    });
    assert.ok(performance.now() - start < 500);
    assert.equal(slots.waiting, 100);
    for (const each of busy) each.finish();
    await Promise.all([...running, ...waiting]);
  });

  test('two hashes need twice the time', async () => {
    const slots = new Slots(1, 10, 100);
    const first = work();
    const running = slots.run(anybody(), first.run);
    await assert.rejects(slots.run(anybody(300, 2), assert.fail), { reason: 'OVERLOADED' });
    const waiting = slots.run(anybody(5000, 2), async () => {});
    first.finish();
    await Promise.all([running, waiting]);
  });

  test('who waits behind a flood of others gets in where the own turn comes early enough', async () => {
    const slots = new Slots(1, 1000, 50);
    const first = work();
    const all = [slots.run(anybody(), first.run)];
    for (let i = 0; i < 200; i++) all.push(slots.run(anybody(), async () => {}));
    const quiet = slots.run(someone(['other', 'peer', 'user'], 2000).applicant, async () => 'served');
    first.finish();
    assert.equal(await quiet, 'served');
    await Promise.all(all);
  });

  test('whose deadline has passed in the queue is refused and never served', async () => {
    const slots = new Slots(1, 10, 0);
    const first = work();
    const running = slots.run(anybody(), first.run);
    const late = slots.run(anybody(40), assert.fail);
    await sleep(60);
    first.finish();
    await assert.rejects(late, (error: Refusal) =>
      ['OVERLOADED', 'DEADLINE_EXCEEDED'].includes(error.reason),
    );
    await running;
    assert.deepEqual([slots.taken, slots.waiting], [0, 0]);
  });

  test('a pause of the whole machine does not close the door for ever', async () => {
    const slots = new Slots(2, 10, 200_000);
    let served = 0;
    for (let i = 0; i < 200; i++) {
      await slots.run(anybody(15_000, 2), async () => {
        await settle();
        served++;
      });
    }
    assert.equal(served, 200);
    assert.ok(slots.hashMs < 100, String(slots.hashMs));
  });

  test('the expectation is what slots were taken for, hashing or not, for each hash of whoever was done', async () => {
    const slots = new Slots(1, 10, 0);
    for (let i = 0; i < 5; i++) await slots.run(anybody(60_000, 2), () => sleep(40));
    // A moving average, from 0, of five times 20 ms.
    assert.ok(slots.hashMs >= 7 && slots.hashMs < 40, String(slots.hashMs));
    const before = slots.hashMs;
    await assert.rejects(slots.run(anybody(), () => Promise.reject(new Error('failed'))));
    assert.equal(slots.hashMs, before, 'who fails at once says nothing about it');
  });
});

describe('going away', () => {
  test('who goes away before the turn is told CANCELLED and never served', async () => {
    const slots = new Slots(1, 10, 0);
    const first = work();
    const running = slots.run(anybody(), first.run);
    const { applicant, goAway } = someone(['app', 'peer', 'user']);
    const waiting = slots.run(applicant, assert.fail);
    assert.equal(slots.waiting, 1);
    goAway();
    await assert.rejects(waiting, { reason: 'CANCELLED' });
    assert.equal(slots.waiting, 0);
    first.finish();
    await running;
    assert.equal(slots.taken, 0);
  });

  test('who has gone away before does not even queue', async () => {
    const slots = new Slots(1, 10, 0);
    const { applicant, goAway } = someone(['app', 'peer', 'user']);
    goAway();
    await assert.rejects(slots.run(applicant, assert.fail), { reason: 'CANCELLED' });
    await assert.rejects(slots.run(anybody(0), assert.fail), { reason: 'DEADLINE_EXCEEDED' });
    assert.deepEqual([slots.taken, slots.waiting], [0, 0]);
  });

  test('nobody who was served keeps listening', async () => {
    const slots = new Slots(1, 10, 0);
    const { applicant } = someone(['app', 'peer', 'user']);
    let listeners = 0;
    const { signal } = applicant.wait;
    const { addEventListener, removeEventListener } = signal;
    signal.addEventListener = (...parameters: Parameters<typeof addEventListener>) => {
      listeners++;
      addEventListener.apply(signal, parameters);
    };
    signal.removeEventListener = (...parameters: Parameters<typeof removeEventListener>) => {
      listeners--;
      removeEventListener.apply(signal, parameters);
    };
    const first = work();
    const running = slots.run(anybody(), first.run);
    const waiting = slots.run(applicant, async () => {});
    assert.equal(listeners, 1);
    first.finish();
    await Promise.all([running, waiting]);
    assert.equal(listeners, 0);
  });
});

test('random comings and goings never exceed the bounds, serve nobody who has left, and leave nothing behind', async () => {
  const seed = randomInt(2 ** 32);
  const random = new Random(seed);
  const slots = new Slots(3, 20, 0);
  let underWay = 0;
  const outcomes: Promise<string>[] = [];
  const waiting: { goAway: () => void; state: { gone: boolean; started: boolean } }[] = [];
  const running: (() => void)[] = [];
  const finishOne = () => running.splice(random.between(0, running.length - 1), 1)[0]?.();

  for (let step = 0; step < 3000; step++) {
    switch (random.weighted({ come: 5, finish: 4, leave: 1 })) {
      case 'come': {
        const { applicant, goAway } = someone([
          `a${random.between(0, 2)}`,
          `p${random.between(0, 2)}`,
          `u${random.between(0, 2)}`,
        ]);
        const state = { gone: false, started: false };
        const job = async () => {
          assert.ok(!state.gone, `seed ${seed}, step ${step}: served after leaving`);
          state.started = true;
          underWay++;
          await new Promise<void>((resolve) => running.push(resolve));
          underWay--;
          return 'served';
        };
        outcomes.push(slots.run(applicant, job).catch((error: Refusal) => error.reason));
        waiting.push({ goAway, state });
        break;
      }
      case 'finish':
        if (running.length > 0) finishOne();
        break;
      case 'leave': {
        const one = waiting.length > 0 ? random.pick(waiting) : undefined;
        if (one && !one.state.started) {
          one.state.gone = true;
          one.goAway();
        }
        break;
      }
    }
    assert.ok(slots.taken <= 3 && slots.waiting <= 20, `seed ${seed}, step ${step}`);
    assert.ok(underWay <= 3, `seed ${seed}, step ${step}`);
    // Whoever is about to start has its turn before the next step.
    await Promise.resolve();
    await new Promise(setImmediate);
  }
  const finishing = setInterval(() => {
    while (running.length > 0) finishOne();
  }, 1);
  const ended = await Promise.all(outcomes);
  clearInterval(finishing);
  assert.deepEqual([slots.taken, slots.waiting, underWay], [0, 0, 0], `seed ${seed}`);
  assert.deepEqual(new Set(ended), new Set(['served', 'OVERLOADED', 'CANCELLED']), `seed ${seed}`);
  assert.ok(ended.every((outcome) => !((outcome as unknown) instanceof Refusal)));
});
