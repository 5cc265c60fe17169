// One conversation with notecase from Go: an agent, a session, a streamed reply, the log, and an error told by its reason.
//
//	go generate && go run . 127.0.0.1:7420
package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	notecase "notecase.dev/api/notecase/v1"
)

func main() {
	ctx, address := context.Background(), append(os.Args[1:], "127.0.0.1:7420")[0]
	channel := must(grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials())))
	sessions, runs := notecase.NewSessionServiceClient(channel), notecase.NewRunServiceClient(channel)

	llm := &notecase.LlmAgent{Provider: "offline", Instruction: "You are a detective."}
	agent := must(notecase.NewAgentServiceClient(channel).UpdateAgent(ctx, &notecase.UpdateAgentRequest{
		Agent:        &notecase.Agent{Name: "agents/detective", Kind: &notecase.Agent_Llm{Llm: llm}},
		AllowMissing: true, // The first time it is created, and this program can be run again.
	}))
	session := must(sessions.CreateSession(ctx, &notecase.CreateSessionRequest{Session: &notecase.Session{Agent: agent.Name}}))
	fmt.Printf("Opened %s.\n", session.Name)

	question := &notecase.Message{Parts: []*notecase.Part{{Kind: &notecase.Part_Text{Text: "Where do we begin?"}}}}
	start := &notecase.StartRun{Session: session.Name, Messages: []*notecase.Message{question}}
	run := must(runs.Run(ctx))
	run.Send(&notecase.RunRequest{Command: &notecase.RunRequest_Start{Start: start}}) // What goes wrong, Recv tells.
	run.CloseSend()                                                                   // No more commands.
	each(run.Recv, func(event *notecase.Event) {
		fmt.Print(event.GetBlockDelta().GetText())
		if event.GetMessageDiscarded() != nil { // The reply begins anew.
			fmt.Println()
		}
	})

	// A stream that broke is taken up after the last sequence seen; after 0 comes the whole log.
	count, watch := 0, &notecase.WatchEventsRequest{Name: session.Name, AfterSequence: proto.Int64(0)}
	each(must(runs.WatchEvents(ctx, watch)).Recv, func(*notecase.Event) { count++ })
	fmt.Printf("\nThe log has %d events.\n", count)

	_, err := sessions.GetSession(ctx, &notecase.GetSessionRequest{Name: "sessions/nobody"})
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			fmt.Printf("%s: %s\n", info.Reason, status.Convert(err).Message())
		}
	}
}

// each takes the events of a stream until the server ends it.
func each(receive func() (*notecase.RunResponse, error), take func(*notecase.Event)) {
	for frame, err := receive(); err != io.EOF; frame, err = receive() {
		for _, event := range must(frame, err).GetBatch().GetEvents() {
			take(event)
		}
	}
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}
