"""Every message and service of the API under one name: `from notecase import v1`, then `v1.Session`, `v1.RunServiceStub`."""

from notecase.v1.agent_pb2 import *
from notecase.v1.agent_pb2_grpc import *
from notecase.v1.audit_pb2 import *
from notecase.v1.audit_pb2_grpc import *
from notecase.v1.blob_pb2 import *
from notecase.v1.blob_pb2_grpc import *
from notecase.v1.content_pb2 import *
from notecase.v1.export_pb2 import *
from notecase.v1.key_pb2 import *
from notecase.v1.key_pb2_grpc import *
from notecase.v1.message_pb2 import *
from notecase.v1.message_pb2_grpc import *
from notecase.v1.run_pb2 import *
from notecase.v1.run_pb2_grpc import *
from notecase.v1.server_pb2 import *
from notecase.v1.server_pb2_grpc import *
from notecase.v1.session_pb2 import *
from notecase.v1.session_pb2_grpc import *
from notecase.v1.state_pb2 import *
from notecase.v1.state_pb2_grpc import *
from notecase.v1.tenant_pb2 import *
from notecase.v1.tenant_pb2_grpc import *

ERROR_DOMAIN = "notecase.dev"
"""The domain of the google.rpc.ErrorInfo in every error of this service."""
