/** A caller in Python, with stubs that are generated from `proto/` for the occasion. */
import { execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { type Python, pythonWithGrpc } from '../../support/python.ts';

export interface PythonOutcome {
  code: string;
  message: string;
  /** Initial metadata. */
  initial: Record<string, string>;
  /** In the names of the proto; 64-bit numbers and times as text. */
  response?: Record<string, unknown>;
  details: {
    ErrorInfo?: { reason: string; domain: string; metadata: Record<string, string> };
    RequestInfo?: { request_id: string };
    BadRequest?: { field_violations: { field: string; reason: string; description: string }[] };
    RetryInfo?: { retry_delay: string };
  };
  /** Of the reason, in the enum ErrorReason. */
  number?: number | null;
}

export interface PythonClient {
  call(
    service: 'UserService' | 'SessionService',
    method: string,
    metadata: Record<string, string>,
    message: Record<string, unknown>,
  ): Promise<PythonOutcome>;
  close(): Promise<void>;
}

const ROOT = fileURLToPath(new URL('../../../', import.meta.url));
const run = promisify(execFile);
const SCRIPT = fileURLToPath(new URL('client.py', import.meta.url));
const FILES = [
  'google/rpc/error_details.proto',
  'google/rpc/status.proto',
  'rekey/v1/error_reason.proto',
  'rekey/v1/session_service.proto',
  'rekey/v1/user_service.proto',
];

/** A Python with gRPC, or why there is none here. */
export async function findPython(): Promise<{ python: Python } | { skip: string }> {
  try {
    return { python: await pythonWithGrpc() };
  } catch (error) {
    return { skip: `no Python with gRPC here: ${(error as Error).message}` };
  }
}

export async function startPythonClient(python: Python, address: string): Promise<PythonClient> {
  const [program = '', ...args] = python.command;
  const env = { ...process.env, ...python.env };
  const stubs = await mkdtemp(join(tmpdir(), 'rekey-python-'));
  // Not every protoc comes with google/protobuf/*.proto; buf does.
  const descriptors = join(stubs, 'descriptors.binpb');
  const build = ['build', ROOT, '--as-file-descriptor-set', '-o', descriptors];
  await run(join(ROOT, 'node_modules', '.bin', 'buf'), build);
  const [compiler = '', ...options] = python.protoc;
  const outputs = [
    `--descriptor_set_in=${descriptors}`,
    `--python_out=${stubs}`,
    `--grpc_python_out=${stubs}`,
  ];
  await run(compiler, [...options, ...outputs, ...FILES], { env });

  // It ends with its input, and so with this process, however that ends.
  const child = spawn(program, [...args, SCRIPT, address, stubs], {
    env,
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  const exited = once(child, 'exit');
  const answers = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  return {
    call: async (service, method, metadata, message) => {
      child.stdin.write(`${JSON.stringify({ service, method, metadata, message })}\n`);
      const { value, done } = await answers.next();
      if (done) throw new Error('the Python client has ended; see its error above');
      return JSON.parse(value);
    },
    close: async () => {
      child.stdin.end();
      await exited;
      await rm(stubs, { recursive: true });
    },
  };
}
