import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import {
  type AuditEvent,
  type AuditFilter,
  type AuditReference,
  insertAuditRecord,
  isRecorded,
  listAuditRecords,
} from '../../src/mysql/audit.ts';
import { inTransaction, testBed } from './test_bed.ts';

const bed = await testBed();
const { db, database, sql } = bed;

const call = {
  cid: 'a cid',
  app: 'CRM',
  remoteAddress: '203.0.113.9',
  peerAddress: '203.0.113.9',
  claimedAddress: undefined,
};
const event: AuditEvent = {
  action: 'ChangePassword',
  outcome: 'refused',
  reason: 'OLD_PASSWORD_MISMATCH',
  actorUserId: 'actor',
  targetUserId: 'target',
  request: {},
};
const list = (filter: Partial<AuditFilter>) => listAuditRecords(db, { limit: 100, ...filter });

let number = 0;
const freshCid = () => `cid ${++number}`;

describe('an audit record', () => {
  test('comes back as it was written, with JSON of every kind', async () => {
    const cid = freshCid();
    const request = {
      password_expiry: 36_500,
      must_change: false,
      note: 'Zürich "\u{1F511}" \\ \u2028',
      zero: 0,
    };
    const { auditId } = await insertAuditRecord(db, { ...call, cid }, { ...event, request });
    const [record, ...more] = await list({ cid });
    assert.deepEqual(more, []);
    const { at, ...rest } = record ?? assert.fail();
    assert.deepEqual(rest, {
      auditId,
      cid,
      ...event,
      request,
      app: 'CRM',
      remoteAddress: '203.0.113.9',
      peerAddress: null,
      claimedAddress: null,
    });
    assert.match(at, /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$/);
    assert.ok(Math.abs(Date.parse(at) - Date.now()) < 60_000, at);
  });

  test('has the time of the database to the microsecond', async () => {
    const cid = freshCid();
    const { auditId } = await insertAuditRecord(db, { ...call, cid }, event);
    await sql("UPDATE audit_log SET at = '2024-02-29 23:59:59.000001' WHERE audit_id = ?", [auditId]);
    assert.equal((await list({ cid }))[0]?.at, '2024-02-29T23:59:59.000001Z');
  });

  test('may be about nobody, by an operator', async () => {
    const cid = freshCid();
    await insertAuditRecord(db, { ...call, cid }, { ...event, actorUserId: null, targetUserId: null });
    assert.partialDeepStrictEqual(await list({ cid }), [{ actorUserId: null, targetUserId: null }]);
  });

  test('keeps the address of the peer and the claim only where they differ', async () => {
    for (const [remoteAddress, peerAddress, claimedAddress, stored] of [
      ['203.0.113.9', '10.0.0.1', '203.0.113.9', ['10.0.0.1', null]],
      ['192.0.2.1', '192.0.2.1', '203.0.113.9', [null, '203.0.113.9']],
      ['192.0.2.1', '192.0.2.1', '192.0.2.1', [null, null]],
      ['unknown', 'unknown', undefined, [null, null]],
    ] as const) {
      const cid = freshCid();
      await insertAuditRecord(db, { ...call, cid, remoteAddress, peerAddress, claimedAddress }, event);
      const [record] = await list({ cid });
      assert.deepEqual([record?.peerAddress, record?.claimedAddress], stored);
      assert.equal(record?.remoteAddress, remoteAddress);
    }
  });

  test('takes the longest metadata there is', async () => {
    const cid = `~ ${'c'.repeat(126)}`;
    const longest = 'ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff';
    await insertAuditRecord(
      db,
      {
        cid,
        app: 'a'.repeat(128),
        remoteAddress: longest,
        peerAddress: 'unknown',
        claimedAddress: '::',
      },
      { ...event, actorUserId: 'u'.repeat(64), targetUserId: '~'.repeat(64), reason: 'R'.repeat(63) },
    );
    assert.partialDeepStrictEqual(await list({ cid }), [{ app: 'a'.repeat(128), remoteAddress: longest }]);
  });
});

describe('whether a record is there', () => {
  test('is told for this very one', async () => {
    const reference = await insertAuditRecord(db, call, event);
    assert.equal(await isRecorded(db, reference), true);
    assert.equal(await isRecorded(db, { ...reference, auditId: reference.auditId + 1000 }), false);
    assert.equal(await isRecorded(db, { ...reference, eventId: Buffer.alloc(16) }), false);
  });

  test('is no when its transaction was rolled back', async () => {
    let reference: AuditReference = { auditId: 0, eventId: Buffer.alloc(16) };
    await assert.rejects(
      inTransaction(database, async (tx) => {
        reference = await insertAuditRecord(tx, call, event);
        assert.equal(await isRecorded(tx, reference), true);
        throw new Error('undone');
      }),
    );
    assert.equal(await isRecorded(db, reference), false);
  });
});

describe('the list', () => {
  test('is filtered by cid, by user in either part, by time, and by all of them', async () => {
    const own = await testBed();
    const insert = async (cid: string, actorUserId: string | null, targetUserId: string, ageDays: number) => {
      const { auditId } = await insertAuditRecord(
        own.db,
        { ...call, cid },
        { ...event, actorUserId, targetUserId },
      );
      await own.sql('UPDATE audit_log SET at = at - INTERVAL ? DAY WHERE audit_id = ?', [ageDays, auditId]);
    };
    await insert('1', 'ada', 'ada', 30);
    await insert('2', 'ada', 'ben', 20);
    await insert('3', null, 'ada', 10);
    await insert('4', 'ben', 'ben', 0);
    await insert('4', 'ben', 'cleo', 0);

    const cids = async (filter: Partial<AuditFilter>) =>
      (await listAuditRecords(own.db, { limit: 100, ...filter })).map(({ cid }) => cid).join('');
    const daysAgo = (days: number) => new Date(Date.now() - days * 86_400_000);
    assert.equal(await cids({}), '12344');
    assert.equal(await cids({ cid: '4' }), '44');
    assert.equal(await cids({ cid: 'none' }), '');
    assert.equal(await cids({ userId: 'ada' }), '123');
    assert.equal(await cids({ userId: 'ben' }), '244');
    assert.equal(await cids({ since: daysAgo(15) }), '344');
    assert.equal(await cids({ since: daysAgo(25), userId: 'ada' }), '23');
    assert.equal(await cids({ since: daysAgo(25), userId: 'ada', cid: '3' }), '3');
    assert.equal(await cids({ limit: 2 }), '44', 'the newest, oldest first');
    assert.equal(await cids({ limit: 3, userId: 'ben' }), '244');
  });

  test('takes what is searched for as it is', async () => {
    for (const cid of ["' OR 1=1 -- ", '%', 'A CID', 'a ci']) {
      assert.deepEqual(await list({ cid }), [], cid);
    }
  });
});
