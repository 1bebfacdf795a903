import { randomUUID } from 'node:crypto';
import { type BlockList, isIP } from 'node:net';
import type { Metadata } from '@grpc/grpc-js';
import type { Call } from '../call.ts';
import type { Violation } from '../password/errors.ts';
import { required } from '../password/policy.ts';

/** Which metadata a method takes, beside `cid`, `app` and `remote-addr`. */
export interface Takes {
  readonly ust: boolean;
  readonly idempotencyKey: boolean;
}

export interface CheckedMetadata {
  readonly caller: Omit<Call, 'wait' | 'learnt'>;
  readonly violations: readonly Violation[];
}

/** Printable ASCII, the space included. */
const PRINTABLE = /^[\x20-\x7e]*$/;
const ID_MAX = 128;
const UST_MAX = 512;
/** Stands for a value that is not printable ASCII: too long for any key. */
export const REFUSED_VALUE = '?'.repeat(UST_MAX + 1);

/**
 * Who calls, by the metadata of the request and the address of the peer, with every fault of the metadata. A cid
 * is there in any case: a missing or bad one is replaced, so that the answer and the log can name it.
 */
export function checkMetadata(
  metadata: Metadata,
  peer: string,
  trustedPeers: BlockList,
  takes: Takes,
): CheckedMetadata {
  const violations: Violation[] = [];
  const take = (key: string, maxLength: number): string | undefined => {
    const values = metadata.get(key);
    const value = values[0];
    if (value === undefined) return undefined;
    // HTTP/2 joins what was sent twice with ", ": no ID that a caller makes has to look like that.
    const isDuplicate = values.length > 1 || (typeof value === 'string' && value.includes(', '));
    if (isDuplicate) violations.push({ field: key, reason: 'DUPLICATE', description: 'must be sent once' });
    else if (value === '') violations.push(required(key, 'must not be empty'));
    else if (typeof value !== 'string' || value.length > maxLength || !PRINTABLE.test(value)) {
      violations.push({
        field: key,
        reason: 'MALFORMED',
        description: `must be 1 to ${maxLength} printable ASCII characters`,
      });
    } else return value;
    return undefined;
  };

  const cid = take('cid', ID_MAX);
  const app = take('app', ID_MAX);
  if (app === undefined && !metadata.get('app').length) violations.push(required('app'));
  const ust = takes.ust ? take('ust', UST_MAX) : undefined;
  const idempotencyKey = takes.idempotencyKey ? take('idempotency-key', ID_MAX) : undefined;
  const claimed = take('remote-addr', ID_MAX);
  const claimedAddress = claimed === undefined ? undefined : normaliseAddress(claimed);
  if (claimed !== undefined && claimedAddress === undefined) {
    violations.push({
      field: 'remote-addr',
      reason: 'MALFORMED',
      description: 'must be an IPv4 or IPv6 address',
    });
  }

  const peerAddress = addressOfPeer(peer);
  const isTrusted =
    isIP(peerAddress) !== 0 && trustedPeers.check(peerAddress, isIP(peerAddress) === 4 ? 'ipv4' : 'ipv6');
  return {
    caller: {
      cid: cid ?? randomUUID(),
      ust: ust ?? '',
      app: app ?? '',
      idempotencyKey,
      remoteAddress: isTrusted && claimedAddress !== undefined ? claimedAddress : peerAddress,
      peerAddress,
      claimedAddress,
    },
    violations,
  };
}

/** `127.0.0.1:5000` and `[fe80::1%eth0]:5000` without ports and zones; IPv4 in IPv6's clothes as IPv4. */
function addressOfPeer(peer: string): string {
  const address = peer
    .slice(0, Math.max(0, peer.lastIndexOf(':')))
    .replace(/^\[|\]$/g, '')
    .replace(/%.*$/, '');
  return normaliseAddress(address) ?? 'unknown';
}

function normaliseAddress(address: string): string | undefined {
  if (isIP(address) === 0 || address.includes('%')) return undefined;
  if (isIP(address) === 4) return address;
  // The URL parser writes IPv6 in its one canonical form.
  const canonical = new URL(`http://[${address}]`).hostname.slice(1, -1);
  const mapped = /^::ffff:([0-9a-f]{1,4}):([0-9a-f]{1,4})$/.exec(canonical);
  if (!mapped) return canonical;
  return mapped
    .slice(1)
    .map((half) => Number.parseInt(half, 16))
    .flatMap((half) => [half >> 8, half & 0xff])
    .join('.');
}
