import {
  type DescMessage,
  type DescMethodUnary,
  fromBinary,
  type MessageShape,
  toBinary,
} from '@bufbuild/protobuf';
import {
  status as Code,
  type handleUnaryCall,
  Metadata,
  type MethodDefinition,
  type ServerUnaryCall,
} from '@grpc/grpc-js';
import { type Call, Wait } from '../call.ts';
import type { Config } from '../config.ts';
import type { Logger } from '../log.ts';
import type { Metrics } from '../metrics.ts';
import { Refusal, type Violation } from '../password/errors.ts';
import { checkMetadata, type Takes } from './caller.ts';
import { toStatus } from './status.ts';

/** What every method needs to be served. */
export interface Edge {
  readonly config: Pick<Config, 'trustedPeers' | 'limits'>;
  readonly log: Logger;
  readonly metrics: Metrics;
  /** Calls whose work has not ended, be their callers still there or not. */
  readonly underWay: Set<Promise<void>>;
}

/** A method's own part: the faults of a message, and what to do with one that has none. */
export interface Handler<I extends DescMessage, O extends DescMessage> {
  readonly takes: Takes;
  check(request: MessageShape<I>): Violation[];
  handle(call: Call, request: MessageShape<I>): Promise<MessageShape<O>>;
}

/**
 * Everything that repeats from method to method: decoding, metadata, deadline, cid, status, log line, metrics.
 * Messages are decoded here and not in grpc-js, which would call bad bytes the server's own fault.
 */
export function unary<I extends DescMessage, O extends DescMessage>(
  edge: Edge,
  method: DescMethodUnary<I, O>,
  handler: Handler<I, O>,
): { definition: MethodDefinition<Buffer, Buffer>; implementation: handleUnaryCall<Buffer, Buffer> } {
  const path = `/${method.parent.typeName}/${method.name}`;
  const same = (bytes: Buffer) => bytes;
  return {
    definition: {
      path,
      requestStream: false,
      responseStream: false,
      requestSerialize: same,
      requestDeserialize: same,
      responseSerialize: same,
      responseDeserialize: same,
    },
    implementation: (grpcCall, respond) => {
      const work = serve(edge, method, handler, grpcCall).then((answer) =>
        'status' in answer ? respond(answer.status) : respond(null, answer.response),
      );
      edge.underWay.add(work);
      work
        .finally(() => edge.underWay.delete(work))
        .catch((error) => edge.log.fatal({ err: error }, 'no answer was sent'));
    },
  };
}

async function serve<I extends DescMessage, O extends DescMessage>(
  { config, log, metrics, underWay: _ }: Edge,
  method: DescMethodUnary<I, O>,
  { takes, check, handle }: Handler<I, O>,
  grpcCall: ServerUnaryCall<Buffer, Buffer>,
): Promise<{ response: Buffer } | { status: ReturnType<typeof toStatus> }> {
  const start = performance.now();
  const { caller, violations } = checkMetadata(
    grpcCall.metadata,
    grpcCall.getPeer(),
    config.trustedPeers,
    takes,
  );
  const { wait, release } = waitOf(grpcCall, config.limits.call_timeout_ms);
  const call: Call = { ...caller, wait, learnt: {} };
  const initial = new Metadata();
  initial.set('cid', call.cid);
  grpcCall.sendMetadata(initial);

  let answer: { response: Buffer } | { status: ReturnType<typeof toStatus> };
  let cause: unknown;
  try {
    wait.throwIfOver();
    const request = decode(method.input, grpcCall.request);
    const faults = [...violations, ...(request ? check(request) : [UNDECODABLE])];
    if (!request || faults.length > 0) throw malformed(faults);
    answer = { response: Buffer.from(toBinary(method.output, await handle(call, request))) };
  } catch (error) {
    answer = { status: toStatus(error, call.cid) };
    cause = error instanceof Refusal ? error.cause : error;
  } finally {
    release();
  }

  const code = 'status' in answer ? answer.status.code : Code.OK;
  const reason = 'status' in answer ? answer.status.reason : '';
  const totalMs = performance.now() - start;
  metrics.called(method.name, Code[code], reason, totalMs / 1000, wait.spent);
  const line = {
    cid: call.cid,
    method: method.name,
    app: call.app,
    actor: call.learnt.actorUserId,
    target: call.learnt.targetUserId,
    replayed: call.learnt.replayed,
    code: Code[code],
    reason: reason || undefined,
    remoteAddr: call.remoteAddress,
    peerAddr: call.peerAddress === call.remoteAddress ? undefined : call.peerAddress,
    ms: round(totalMs),
    queueMs: round(wait.spent.queue),
    hashMs: round(wait.spent.hash),
    databaseMs: round(wait.spent.database),
    err: cause,
  };
  if (code === Code.INTERNAL) log.error(line, 'call');
  else if (code === Code.UNAVAILABLE) log.warn(line, 'call');
  else log.info(line, 'call');
  return answer;
}

const UNDECODABLE: Violation = {
  field: 'message',
  reason: 'MALFORMED',
  description: 'must be a valid protobuf message, its strings valid UTF-8',
};

const round = (ms: number) => Math.round(ms * 10) / 10;

function decode<I extends DescMessage>(schema: I, bytes: Buffer): MessageShape<I> | undefined {
  try {
    return fromBinary(schema, bytes, { readUnknownFields: false });
  } catch {
    return undefined;
  }
}

function malformed(violations: readonly Violation[]): Refusal {
  const isMissing = violations.some(({ reason }) => reason === 'REQUIRED');
  const isWrong = violations.some(({ reason }) => reason !== 'REQUIRED');
  return new Refusal('INVALID_REQUEST', {
    violations,
    subStatus: [...(isWrong ? ['E008002'] : []), ...(isMissing ? ['E008003'] : [])],
  });
}

/** Until the caller's deadline, or the server's own limit, or until the caller goes away. */
function waitOf(
  grpcCall: ServerUnaryCall<Buffer, Buffer>,
  limitMs: number,
): { wait: Wait; release: () => void } {
  const controller = new AbortController();
  const callersMs = Number(grpcCall.getDeadline()) - Date.now();
  const ms = Math.min(limitMs, callersMs);
  const deadline = performance.now() + ms;
  const timer = setTimeout(() => controller.abort(new Refusal('DEADLINE_EXCEEDED')), Math.max(0, ms));
  const cancel = () => {
    // grpc-js tells of a deadline that it enforced itself in the same way.
    const isLate = performance.now() >= deadline;
    controller.abort(new Refusal(isLate ? 'DEADLINE_EXCEEDED' : 'CANCELLED'));
  };
  grpcCall.on('cancelled', cancel);
  if (grpcCall.cancelled) cancel();
  return {
    wait: new Wait(controller.signal, deadline),
    release: () => {
      clearTimeout(timer);
      grpcCall.removeListener('cancelled', cancel);
    },
  };
}
