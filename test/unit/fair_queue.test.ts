import assert from 'node:assert/strict';
import { randomInt } from 'node:crypto';
import { describe, test } from 'node:test';
import { FairQueue } from '../../src/password/fair_queue.ts';
import { Random } from '../fault/random.ts';

type Path = readonly [app: string, peer: string, user: string];

function drained(queue: FairQueue<string>): string[] {
  const order: string[] = [];
  for (let entry = queue.shift(); entry !== undefined; entry = queue.shift()) order.push(entry);
  return order;
}

const pushed = (entries: readonly [Path, string][]) => {
  const queue = new FairQueue<string>();
  for (const [path, entry] of entries) queue.push(path, entry);
  return queue;
};

const flood = (path: Path, count: number): [Path, string][] =>
  Array.from({ length: count }, (_, index) => [path, `flood ${index}`]);

describe('turns', () => {
  test('one user is served first come, first served', () => {
    const queue = pushed([
      [['a', 'p', 'u'], '1'],
      [['a', 'p', 'u'], '2'],
      [['a', 'p', 'u'], '3'],
    ]);
    assert.deepEqual(drained(queue), ['1', '2', '3']);
    assert.equal(queue.shift(), undefined);
  });

  for (const [who, other] of [
    ['a user', ['app', 'peer', 'other']],
    ['a peer', ['app', 'other', 'user']],
    ['an application', ['other', 'peer', 'user']],
  ] as [string, Path][]) {
    test(`${who} who comes behind a thousand of another waits for one of them`, () => {
      const queue = pushed(flood(['app', 'peer', 'user'], 1000));
      queue.push(other, 'late 1');
      queue.push(other, 'late 2');
      const order = drained(queue);
      assert.equal(order.length, 1002);
      assert.ok(order.indexOf('late 1') <= 1, String(order.indexOf('late 1')));
      assert.ok(order.indexOf('late 2') <= 3, String(order.indexOf('late 2')));
    });
  }

  test('a hundred users of one application get no more than the one user of another', () => {
    const queue = new FairQueue<string>();
    for (let user = 0; user < 100; user++) {
      for (let i = 0; i < 10; i++) queue.push(['busy', 'peer', `u${user}`], `busy ${user} ${i}`);
    }
    for (let i = 0; i < 10; i++) queue.push(['quiet', 'peer', 'u'], `quiet ${i}`);
    assert.equal(
      drained(queue)
        .slice(0, 20)
        .filter((entry) => entry.startsWith('quiet')).length,
      10,
    );
  });

  test('whoever comes again after each turn does not push in front of those who wait', () => {
    const queue = pushed([
      [['a', 'p', 'u1'], 'u1'],
      [['b', 'p', 'u2'], 'u2'],
      [['c', 'p', 'u3'], 'u3'],
    ]);
    const served = Array.from({ length: 9 }, () => {
      const entry = queue.shift() as string;
      queue.push([{ u1: 'a', u2: 'b', u3: 'c' }[entry] as string, 'p', entry], entry);
      return entry;
    });
    assert.deepEqual(served, ['u1', 'u2', 'u3', 'u1', 'u2', 'u3', 'u1', 'u2', 'u3']);
  });
});

describe('leaving', () => {
  test('who has left is not served, and can leave once', () => {
    const queue = pushed([
      [['a', 'p', 'u'], '1'],
      [['a', 'p', 'u'], '2'],
    ]);
    assert.ok(queue.delete(['a', 'p', 'u'], '1'));
    assert.ok(!queue.delete(['a', 'p', 'u'], '1'));
    assert.ok(!queue.delete(['a', 'p', 'nobody'], '2'));
    assert.ok(!queue.delete(['nobody', 'p', 'u'], '2'));
    assert.equal(queue.size, 1);
    assert.deepEqual(drained(queue), ['2']);
  });

  test('who has been served cannot leave', () => {
    const queue = pushed([[['a', 'p', 'u'], '1']]);
    queue.shift();
    assert.ok(!queue.delete(['a', 'p', 'u'], '1'));
    assert.equal(queue.size, 0);
  });
});

describe('when there are too many', () => {
  test('the newest of whoever has the most goes, level by level', () => {
    const queue = pushed([
      [['a', 'p', 'u1'], 'a1'],
      [['a', 'p', 'u2'], 'a2'],
      [['b', 'p', 'u1'], 'b1'],
      [['b', 'q', 'u1'], 'b2'],
      [['b', 'q', 'u2'], 'b3'],
      [['b', 'q', 'u2'], 'b4'],
    ]);
    assert.equal(queue.dropFromLongest(), 'b4');
    assert.equal(queue.size, 5);
    assert.ok(!drained(queue).includes('b4'));
  });

  test('nobody goes from an empty queue', () => {
    assert.equal(new FairQueue<string>().dropFromLongest(), undefined);
  });
});

/** The slowest queue that does the same: lists, walked each time. */
class Model {
  readonly root = new Map<string, Map<string, Map<string, string[]>>>();

  push([app, peer, user]: Path, entry: string): void {
    const peers = this.root.get(app) ?? new Map();
    const users = peers.get(peer) ?? new Map();
    const entries = users.get(user) ?? [];
    entries.push(entry);
    this.root.set(app, peers.set(peer, users.set(user, entries)));
  }

  all(): string[] {
    return [...this.root.values()].flatMap((peers) =>
      [...peers.values()].flatMap((users) => [...users.values()].flat()),
    );
  }

  shift(): string | undefined {
    const [app] = this.root;
    if (!app) return undefined;
    const [peer] = app[1];
    const [user] = peer?.[1] ?? [];
    if (!peer || !user) return undefined;
    const entry = user[1].shift();
    rotate(peer[1], user[0], user[1].length > 0);
    rotate(app[1], peer[0], peer[1].size > 0);
    rotate(this.root, app[0], app[1].size > 0);
    return entry;
  }

  delete([app, peer, user]: Path, entry: string): boolean {
    const entries = this.root.get(app)?.get(peer)?.get(user) ?? [];
    const index = entries.indexOf(entry);
    if (index < 0) return false;
    entries.splice(index, 1);
    if (entries.length === 0) this.root.get(app)?.get(peer)?.delete(user);
    if (this.root.get(app)?.get(peer)?.size === 0) this.root.get(app)?.delete(peer);
    if (this.root.get(app)?.size === 0) this.root.delete(app);
    return true;
  }
}

function rotate<T>(map: Map<string, T>, key: string, keep: boolean): void {
  const value = map.get(key) as T;
  map.delete(key);
  if (keep) map.set(key, value);
}

test('random operations leave the same as in a simple model, and nothing behind', () => {
  const seed = randomInt(2 ** 32);
  const random = new Random(seed);
  const queue = new FairQueue<string>();
  const model = new Model();
  const paths = new Map<string, Path>();
  for (let step = 0; step < 20_000; step++) {
    const what = `seed ${seed}, step ${step}`;
    const path: Path = [`a${random.between(0, 2)}`, `p${random.between(0, 2)}`, `u${random.between(0, 3)}`];
    switch (random.weighted({ push: 5, shift: 3, delete: 2, drop: 1 })) {
      case 'push': {
        const entry = String(step);
        const waiting = model.all().length;
        const ahead = queue.ahead(path);
        assert.ok(ahead >= 0 && ahead <= waiting, what);
        queue.push(path, entry);
        model.push(path, entry);
        paths.set(entry, path);
        break;
      }
      case 'shift':
        assert.equal(queue.shift(), model.shift(), what);
        break;
      case 'delete': {
        const waiting = model.all();
        const entry = waiting.length > 0 ? random.pick(waiting) : 'nobody';
        const of = paths.get(entry) ?? path;
        assert.equal(queue.delete(of, entry), model.delete(of, entry), what);
        break;
      }
      case 'drop': {
        const entry = queue.dropFromLongest();
        if (entry === undefined) assert.equal(model.all().length, 0, what);
        else assert.ok(model.delete(paths.get(entry) as Path, entry), what);
        break;
      }
    }
    assert.equal(queue.size, model.all().length, what);
  }
  const rest: string[] = [];
  for (let entry = model.shift(); entry !== undefined; entry = model.shift()) rest.push(entry);
  assert.deepEqual(drained(queue), rest, `seed ${seed}`);
  assert.equal(queue.size, 0);
  // A queue that has forgotten everybody behaves as a new one.
  for (const name of ['x', 'y']) queue.push([name, name, name], name);
  assert.deepEqual(drained(queue), ['x', 'y']);
});

test('what is told to be ahead is never more than is served before, were nobody else to come', () => {
  const seed = randomInt(2 ** 32);
  const random = new Random(seed);
  for (let round = 0; round < 500; round++) {
    const queue = new FairQueue<string>();
    for (let i = random.between(0, 60); i > 0; i--) {
      queue.push(
        [`a${random.between(0, 2)}`, `p${random.between(0, 2)}`, `u${random.between(0, 3)}`],
        'other',
      );
      if (random.chance(0.3)) queue.shift();
    }
    const path: Path = [`a${random.between(0, 3)}`, `p${random.between(0, 3)}`, `u${random.between(0, 4)}`];
    const told = queue.ahead(path);
    queue.push(path, 'own');
    const actual = drained(queue).indexOf('own');
    assert.ok(actual <= told, `seed ${seed}, round ${round}: told ${told}, were ${actual}`);
  }
});
