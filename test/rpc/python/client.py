"""Calls Rekey with the stubs in sys.argv[2], generated for Python: a call a line in, its outcome a line out, as JSON.

In:  {"service": "UserService", "method": "ChangePassword", "metadata": {...}, "message": {...}, "timeout": 5}
Out: {"code": "OK", "message": "", "initial": {...}, "response": {...}, "details": {"ErrorInfo": {...}, ...}}
"""

import json
import os
import sys

address, stubs = sys.argv[1:]
sys.path.insert(0, stubs)

import google  # noqa: E402  Where it is a regular package it has to be told of the generated google.rpc.

if os.path.join(stubs, "google") not in google.__path__:
    google.__path__.append(os.path.join(stubs, "google"))

import grpc  # noqa: E402
from google.protobuf import json_format  # noqa: E402
from google.rpc import error_details_pb2, status_pb2  # noqa: E402
from rekey.v1 import (  # noqa: E402
    error_reason_pb2,
    session_service_pb2,
    session_service_pb2_grpc,
    user_service_pb2,
    user_service_pb2_grpc,
)

channel = grpc.insecure_channel(address)
services = {
    "UserService": (user_service_pb2, user_service_pb2_grpc.UserServiceStub(channel)),
    "SessionService": (session_service_pb2, session_service_pb2_grpc.SessionServiceStub(channel)),
}


def to_dict(message):
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def details_of(trailers):
    """The details of grpc-status-details-bin, by the names of their types."""
    details = {}
    for packed in status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b"")).details:
        name = packed.type_url.rsplit(".", 1)[-1]
        message = getattr(error_details_pb2, name)()
        assert packed.Unpack(message) and name not in details
        details[name] = to_dict(message)
    return details


def call(request):
    messages, stub = services[request["service"]]
    message = json_format.ParseDict(request["message"], getattr(messages, request["method"] + "Request")())
    outcome = {"code": "OK", "message": "", "details": {}}
    try:
        response, rpc = getattr(stub, request["method"]).with_call(
            message, metadata=list(request["metadata"].items()), timeout=request.get("timeout", 20)
        )
        outcome["response"] = to_dict(response)
    except grpc.RpcError as error:
        rpc = error
        outcome.update(code=error.code().name, message=error.details())
        outcome["details"] = details_of(dict(error.trailing_metadata() or ()))
        reason = outcome["details"].get("ErrorInfo", {}).get("reason")
        # A client switches on the enum, as error_reason.proto says.
        outcome["number"] = reason and error_reason_pb2.ErrorReason.Value("ERROR_REASON_" + reason)
    outcome["initial"] = dict(rpc.initial_metadata() or ())
    return outcome


for line in sys.stdin:
    print(json.dumps(call(json.loads(line))), flush=True)
