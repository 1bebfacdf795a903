import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { RowDataPacket } from 'mysql2/promise';
import type { Command, Fate } from '../support/mysql_wire.ts';
import { type PrivateDatabase, startPrivateDatabase } from '../support/private_database.ts';
import { Caller, type Heard, truthOf } from './caller.ts';
import { type LedgerEntry, readLedger } from './ledger.ts';
import { buildStage, LEDGER_SERVER_ARGS, restartUntilItRuns, type ServerPlace, type Stage } from './stage.ts';

let database: PrivateDatabase;
let stage: Stage;
let server: ServerPlace;
let caller: Caller;
let serial = 0;

before(async () => {
  database = await startPrivateDatabase({ kind: 'mariadb', args: LEDGER_SERVER_ARGS });
  stage = await buildStage({ databaseUrl: () => database.url(), servers: 1 });
  server = stage.servers[0] as ServerPlace;
  caller = new Caller(stage);
});

after(async () => {
  caller?.dispose();
  await stage?.dispose();
  await database?.dispose();
});

interface Person {
  readonly userId: string;
  readonly password: string;
  readonly ust: string;
}

async function newPerson(isSuperUser = false): Promise<Person> {
  const password = `old-password-${++serial}`;
  const userId = await stage.createUser({ username: `person${serial}`, password, isSuperUser });
  return { userId, password, ust: await stage.openSession(userId) };
}

/** Does `harm` when the first command that `matches` comes by, and lets it have that fate. */
function once(
  matches: (command: Command) => boolean,
  harm: () => void,
  fate: Fate,
): { hasHappened: () => boolean } {
  let hasHappened = false;
  stage.proxy.decide = (command) => {
    if (hasHappened || !matches(command)) return 'pass';
    hasHappened = true;
    harm();
    return fate;
  };
  return { hasHappened: () => hasHappened };
}

/** Everything runs again, and nothing is under way any more. */
async function recover(): Promise<void> {
  stage.proxy.decide = undefined;
  await ended;
  if (database.pid === undefined) await restartUntilItRuns(database);
  if (!server.isRunning) await server.start();
  while (stage.proxy.underWay > 0) await sleep(10);
}

let ended: Promise<unknown> = Promise.resolve();
const killServer = () => {
  ended = server.end('SIGKILL');
};
const killDatabase = () => {
  ended = database.kill();
};

async function commandsOf(change: () => Promise<Heard>): Promise<number> {
  let commands = 0;
  stage.proxy.decide = ({ isTransactional, kind, place }) => {
    if (isTransactional && kind !== 'prepare') commands = Math.max(commands, place);
    return 'pass';
  };
  assert.equal((await change()).reason, 'OK');
  stage.proxy.decide = undefined;
  return commands;
}

/** @throws if the call was answered before it came to that command. */
async function untilStruck(strike: { hasHappened: () => boolean }, answer: Promise<Heard>): Promise<void> {
  let early: Heard | undefined;
  answer.then((heard) => {
    early = heard;
  });
  while (!strike.hasHappened()) {
    if (early) assert.fail(`answered with ${early.reason} before the command was sent`);
    await sleep(1);
  }
}

const records = (ledger: readonly LedgerEntry[], kind: LedgerEntry['kind'], userId: string) =>
  ledger.filter((entry) => entry.kind === kind && entry.subject === userId).length;

describe('SIGKILL at each statement of a change: hash and audit record both or neither, and what was acknowledged stays', () => {
  const kinds = ['own change', "super-user's change"] as const;
  const victims = ['server', 'database'] as const;
  const moments = ['before', 'after'] as const;

  for (const kind of kinds) {
    test(kind, async (t) => {
      const change = async () => {
        const target = await newPerson();
        const actor = kind === 'own change' ? target : await newPerson(true);
        const next = `new-password-${serial}`;
        const cid = `crash-${serial}`;
        const ask = () =>
          caller.change(
            { ust: actor.ust, cid, key: `key-${serial}` },
            kind === 'own change'
              ? { oldPassword: target.password, newPassword: next }
              : { newPassword: next, userId: target.userId },
          );
        return { target, next, cid, ask };
      };
      const commands = await commandsOf((await change()).ask);
      assert.ok(commands >= 4, `${commands} commands`);
      let struck = 0;
      const outcomes = new Map<string, number>();
      for (let place = 1; place <= commands; place++) {
        for (const victim of victims) {
          for (const moment of moments) {
            const { target, next, cid, ask } = await change();
            const fate = moment === 'before' ? 'cut-before' : victim === 'server' ? 'late' : 'cut-after';
            // The database is to be killed once it has carried out the command.
            const harm =
              victim === 'server'
                ? killServer
                : () => {
                    if (moment === 'before') killDatabase();
                    else setTimeout(killDatabase, 4);
                  };
            const strike = once(
              ({ isTransactional, kind, place: at }) => isTransactional && kind !== 'prepare' && at === place,
              harm,
              fate,
            );
            const answer = ask();
            await untilStruck(strike, answer);
            struck++;
            await sleep(20);
            await ended;
            // A database that comes back soon is a server's chance to answer truthfully.
            if (victim === 'database') await restartUntilItRuns(database);
            const { reason, isUnknown } = await answer;
            await recover();
            const db = await stage.connect();
            const truth = await truthOf(db, stage.hasher, target.userId, [target.password, next], cid);
            const ledger = await readLedger(db);
            db.destroy();
            const where = `${victim} killed ${moment} command ${place}: ${reason}, ${JSON.stringify(truth)}`;
            const isChanged = truth.password === next;
            assert.notEqual(truth.password, 'none of them', where);
            assert.equal(truth.records, isChanged ? 1 : 0, where);
            assert.equal(records(ledger, 'hash', target.userId), isChanged ? 1 : 0, where);
            if (!isUnknown) assert.equal(reason === 'OK', isChanged, where);
            outcomes.set(reason, (outcomes.get(reason) ?? 0) + 1);
            const again = await ask();
            assert.equal(again.reason, 'OK', `the retry after: ${where}`);
          }
        }
      }
      t.diagnostic(
        `${struck} kills at ${commands} commands; answers ${JSON.stringify(Object.fromEntries(outcomes))}`,
      );
    });
  }
});

describe('an attempt that was counted stays counted', () => {
  const attemptsOf = async (userId: string): Promise<number> => {
    const db = await stage.connect();
    const [rows] = await db.query<RowDataPacket[]>(
      'SELECT old_password_attempts FROM users WHERE user_id = ?',
      [userId],
    );
    db.destroy();
    return Number(rows[0]?.old_password_attempts);
  };
  const guess = async (person: Person) =>
    caller.change(
      { ust: person.ust, cid: `guess-${++serial}` },
      { oldPassword: 'not the password', newPassword: 'some-other-one-7' },
    );
  const isCount = ({ kind, sql }: Command) => kind === 'execute' && sql.includes('old_password_attempts + 1');
  /** A wrong guess is audited after it was verified. */
  const isAfterVerification = ({ kind, sql }: Command) =>
    kind === 'execute' && sql.includes('INSERT INTO audit_log');

  test('by a server that is killed before it hears that it counted', async () => {
    const person = await newPerson();
    const strike = once(isCount, killServer, 'late');
    assert.equal((await guess(person)).isUnknown, true);
    assert.ok(strike.hasHappened());
    await recover();
    assert.equal(await attemptsOf(person.userId), 1);
  });
  test('by a server that is killed after the verification', async () => {
    const person = await newPerson();
    once(isAfterVerification, killServer, 'cut-before');
    assert.equal((await guess(person)).isUnknown, true);
    await recover();
    assert.equal(await attemptsOf(person.userId), 1);
  });
  test('by a database that is killed after the verification', async () => {
    const person = await newPerson();
    once(isAfterVerification, killDatabase, 'cut-before');
    await guess(person);
    await recover();
    assert.equal(await attemptsOf(person.userId), 1);
  });
  test('where the reply to the count is lost, at least once', async () => {
    const person = await newPerson();
    once(isCount, () => {}, 'cut-after');
    assert.equal((await guess(person)).reason, 'OLD_PASSWORD_MISMATCH');
    await recover();
    assert.ok((await attemptsOf(person.userId)) >= 1);
  });
});

test('every change that was acknowledged is there after the database is killed under load', async (t) => {
  const ROUNDS = 4;
  const PEOPLE = 6;
  let acknowledged = 0;
  for (let round = 0; round < ROUNDS; round++) {
    let isOver = false;
    const people = await Promise.all(Array.from({ length: PEOPLE }, () => newPerson()));
    const work = async (person: Person) => {
      let current = person.password;
      let asked = current;
      for (let step = 1; !isOver; step++) {
        asked = `${person.password}-${step}`;
        const { reason } = await caller.change(
          { ust: person.ust, cid: `load-${++serial}` },
          { oldPassword: current, newPassword: asked },
        );
        if (reason !== 'OK') return { person, current, asked };
        acknowledged++;
        current = asked;
      }
      return { person, current, asked };
    };
    const working = people.map(work);
    await sleep(600);
    await database.kill();
    isOver = true;
    await sleep(100);
    await restartUntilItRuns(database);
    const last = await Promise.all(working);
    await recover();
    const db = await stage.connect();
    for (const { person, current, asked } of last) {
      const { password } = await truthOf(db, stage.hasher, person.userId, [current, asked], '');
      assert.notEqual(password, 'none of them', 'an acknowledged change is lost');
    }
    db.destroy();
  }
  t.diagnostic(`${acknowledged} acknowledged changes, ${ROUNDS} kills`);
  assert.ok(acknowledged > ROUNDS * PEOPLE);
});
