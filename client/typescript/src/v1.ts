// The messages and services of notecase.v1.
export * from "./gen/notecase/v1/agent_pb.js";
export * from "./gen/notecase/v1/audit_pb.js";
export * from "./gen/notecase/v1/blob_pb.js";
export * from "./gen/notecase/v1/content_pb.js";
export * from "./gen/notecase/v1/export_pb.js";
export * from "./gen/notecase/v1/key_pb.js";
export * from "./gen/notecase/v1/message_pb.js";
export * from "./gen/notecase/v1/run_pb.js";
export * from "./gen/notecase/v1/server_pb.js";
export * from "./gen/notecase/v1/session_pb.js";
export * from "./gen/notecase/v1/state_pb.js";
export * from "./gen/notecase/v1/tenant_pb.js";
