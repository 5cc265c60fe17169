package main

// Plain protoc, with the two plugins that go.mod pins.
//go:generate sh -c "protoc -I ../../proto --plugin=$(go tool -n protoc-gen-go) --go_out=module=notecase.dev/api:api ../../proto/notecase/v1/*.proto"
//go:generate sh -c "protoc -I ../../proto --plugin=$(go tool -n protoc-gen-go-grpc) --go-grpc_out=module=notecase.dev/api:api ../../proto/notecase/v1/*.proto"
