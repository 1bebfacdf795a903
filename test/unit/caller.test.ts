import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { Metadata } from '@grpc/grpc-js';
import { loadConfig } from '../../src/config.ts';
import { checkMetadata } from '../../src/rpc/caller.ts';

const trusting = (...networks: string[]) =>
  loadConfig(undefined, {
    REKEY_APPS: 'CRM',
    REKEY_DATABASE_URL: 'mysql://u:p@h/d',
    REKEY_TRUSTED_PEERS: networks.join(','),
  }).trustedPeers;

const everything = { ust: true, idempotencyKey: true };
const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/;

function check(
  pairs: Record<string, string | string[]>,
  { peer = '192.0.2.1:5000', trusted = trusting(), takes = everything } = {},
) {
  const metadata = new Metadata();
  for (const [key, values] of Object.entries(pairs)) {
    for (const value of [values].flat()) metadata.add(key, value);
  }
  const { caller, violations } = checkMetadata(metadata, peer, trusted, takes);
  return { caller, faults: violations.map(({ field, reason }) => `${field} ${reason}`), violations };
}

describe('metadata', () => {
  test('is taken as it is sent', () => {
    const { caller, faults } = check({
      ust: 'token',
      app: 'CRM',
      cid: 'one call',
      'idempotency-key': 'key-1',
      'remote-addr': '203.0.113.9',
    });
    assert.deepEqual(faults, []);
    assert.deepEqual(caller, {
      ust: 'token',
      app: 'CRM',
      cid: 'one call',
      idempotencyKey: 'key-1',
      remoteAddress: '192.0.2.1',
      peerAddress: '192.0.2.1',
      claimedAddress: '203.0.113.9',
    });
  });

  test('without a cid gets one, another each time', () => {
    const [one, other] = [check({ app: 'CRM' }), check({ app: 'CRM' })];
    assert.match(one.caller.cid, UUID);
    assert.notEqual(one.caller.cid, other.caller.cid);
    assert.deepEqual(one.faults, []);
  });

  test('with a bad cid is refused, and the answer has a cid all the same', () => {
    for (const cid of ['', 'x'.repeat(129), 'a, b']) {
      const { caller, faults } = check({ app: 'CRM', cid });
      assert.match(caller.cid, UUID);
      assert.equal(faults.length, 1, cid);
      assert.match(faults[0] ?? '', /^cid /);
    }
  });

  test('must name an application', () => {
    assert.deepEqual(check({}).faults, ['app REQUIRED']);
    assert.deepEqual(check({ app: '' }).faults, ['app REQUIRED']);
  });

  test('without a session token is well formed: that is for the session check to refuse', () => {
    assert.deepEqual(check({ app: 'CRM' }).faults, []);
    assert.equal(check({ app: 'CRM' }).caller.ust, '');
  });

  test('that a method does not take is not looked at', () => {
    const takes = { ust: false, idempotencyKey: false };
    const { caller, faults } = check(
      { app: 'CRM', ust: 'x'.repeat(4000), 'idempotency-key': 'x'.repeat(4000) },
      { takes },
    );
    assert.deepEqual(faults, []);
    assert.equal(caller.ust, '');
    assert.equal(caller.idempotencyKey, undefined);
  });

  test('may be as long as its limit and no longer', () => {
    const limits = { cid: 128, app: 128, 'idempotency-key': 128, ust: 512 };
    for (const [key, limit] of Object.entries(limits)) {
      assert.deepEqual(check({ app: 'CRM', [key]: 'x'.repeat(limit) }).faults, [], key);
      assert.deepEqual(check({ app: 'CRM', [key]: 'x'.repeat(limit + 1) }).faults, [`${key} MALFORMED`]);
    }
  });

  test('sent twice is refused, whether it arrives apart or joined as HTTP/2 does it', () => {
    for (const key of ['cid', 'app', 'ust', 'idempotency-key', 'remote-addr']) {
      for (const twice of [['::1', '::1'], '::1, ::1']) {
        const { faults } = check({ app: 'CRM', [key]: twice });
        assert.ok(faults.includes(`${key} DUPLICATE`), `${key}: ${faults}`);
      }
    }
  });

  test('beyond printable ASCII is refused', () => {
    // As Node hands over what stands between the bytes of a header: Latin-1.
    for (const value of ['a\tb', 'a\u007fb', 'caf\u00e9', '\u0080']) {
      const metadata = new Metadata();
      metadata.getMap = () => ({});
      metadata.get = (key) => (key === 'cid' ? [value] : key === 'app' ? ['CRM'] : []);
      const { violations } = checkMetadata(metadata, '192.0.2.1:1', trusting(), everything);
      assert.deepEqual(
        violations.map(({ field, reason }) => [field, reason]),
        [['cid', 'MALFORMED']],
        JSON.stringify(value),
      );
    }
  });

  test('with several faults is told all of them, and none repeats a value', () => {
    const canary = `canary${'x'.repeat(600)}`;
    const { violations, faults } = check({
      app: canary,
      cid: canary,
      ust: canary,
      'idempotency-key': canary,
      'remote-addr': 'canary',
    });
    assert.equal(faults.length, 5);
    assert.doesNotMatch(JSON.stringify(violations), /canary/);
  });
});

describe('the remote address', () => {
  const claim = (peer: string, claimed: string | undefined, ...trusted: string[]) =>
    check(claimed === undefined ? { app: 'CRM' } : { app: 'CRM', 'remote-addr': claimed }, {
      peer,
      trusted: trusting(...trusted),
    });

  test('is the claimed one from a trusted peer', () => {
    for (const [peer, network] of [
      ['10.1.2.3:5000', '10.0.0.0/8'],
      ['10.1.2.3:5000', '10.1.2.3'],
      ['[2001:db8::5]:5000', '2001:db8::/32'],
      ['2001:db8::5:5000', '2001:db8::/32'],
      ['[::ffff:10.1.2.3]:5000', '10.0.0.0/8'],
      ['::ffff:10.1.2.3:5000', '10.0.0.0/8'],
    ] as const) {
      const { caller } = claim(peer, '203.0.113.9', network);
      assert.equal(caller.remoteAddress, '203.0.113.9', peer);
      assert.equal(caller.claimedAddress, '203.0.113.9');
    }
  });

  test("is the peer's own from any other peer, and the claim stays a claim", () => {
    for (const [peer, address] of [
      ['192.0.2.1:5000', '192.0.2.1'],
      ['11.0.0.1:5000', '11.0.0.1'],
      ['[2001:db9::5]:5000', '2001:db9::5'],
      ['[::ffff:192.0.2.1]:5000', '192.0.2.1'],
    ] as const) {
      const { caller } = claim(peer, '203.0.113.9', '10.0.0.0/8', '2001:db8::/32');
      assert.equal(caller.remoteAddress, address);
      assert.equal(caller.peerAddress, address);
      assert.equal(caller.claimedAddress, '203.0.113.9');
    }
  });

  test("is a trusted peer's own where nothing is claimed", () => {
    const { caller } = claim('10.1.2.3:5000', undefined, '10.0.0.0/8');
    assert.equal(caller.remoteAddress, '10.1.2.3');
    assert.equal(caller.claimedAddress, undefined);
  });

  test('is written in one form whatever form it is claimed in', () => {
    for (const [claimed, canonical] of [
      ['203.0.113.9', '203.0.113.9'],
      ['2001:DB8:0:0:0:0:0:1', '2001:db8::1'],
      ['::ffff:203.0.113.9', '203.0.113.9'],
      ['::FFFF:203.0.113.9', '203.0.113.9'],
      ['::ffff:cb00:7109', '203.0.113.9'],
      ['0:0:0:0:0:ffff:203.0.113.9', '203.0.113.9'],
      ['::1', '::1'],
    ] as const) {
      assert.equal(claim('10.1.2.3:1', claimed, '10.0.0.0/8').caller.remoteAddress, canonical, claimed);
    }
  });

  test('must be an address and nothing else', () => {
    for (const claimed of [
      'localhost',
      '203.0.113.256',
      '203.0.113',
      '203.0.113.9:80',
      '[::1]',
      '::1%eth0',
      'fe80::1%1',
      '0x7f.1',
      '2130706433',
      ' ::1',
      '10.0.0.0/8',
      ':::1',
    ]) {
      const { caller, faults } = claim('10.1.2.3:1', claimed, '10.0.0.0/8');
      assert.deepEqual(faults, ['remote-addr MALFORMED'], claimed);
      assert.equal(caller.remoteAddress, '10.1.2.3');
    }
  });

  test('of a peer on the local link is known without its zone', () => {
    assert.equal(claim('fe80::1%eth0:5000', undefined).caller.peerAddress, 'fe80::1');
    assert.equal(claim('[fe80::1%eth0]:5000', '::2', 'fe80::/10').caller.remoteAddress, '::2');
  });

  test('of a peer without one is unknown, and nobody trusts that', () => {
    for (const peer of ['unknown', 'unix:/run/rekey.sock', '', 'unix:']) {
      const { caller } = claim(peer, '203.0.113.9', '0.0.0.0/0', '::/0');
      assert.equal(caller.peerAddress, 'unknown', peer);
      assert.equal(caller.remoteAddress, 'unknown', peer);
    }
  });
});
