package main

// Plain protoc, with the two plugins that go.mod pins.
//go:generate mkdir -p gen
//go:generate sh -c "protoc -I ../../proto --plugin=$(go tool -n protoc-gen-go) --go_out=paths=source_relative:gen ../../proto/notecase/v1/*.proto"
//go:generate sh -c "protoc -I ../../proto --plugin=$(go tool -n protoc-gen-go-grpc) --go-grpc_out=paths=source_relative:gen ../../proto/notecase/v1/*.proto"
