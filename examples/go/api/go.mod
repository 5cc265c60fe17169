// The stubs, which go generate writes here. Nothing serves the name notecase.dev/api: a replace line leads to this folder.
module notecase.dev/api

go 1.26.0

require (
	google.golang.org/grpc v1.85.0
	google.golang.org/protobuf v1.36.12
)
