// One conversation with notecase from Go: an agent, a session, a streamed reply, the log, and an error read by its reason.
//
//	go run . 127.0.0.1:7420
package main

import (
	"context"
	"fmt"
	"log"
	"os"

	"google.golang.org/protobuf/proto"

	"notecase.dev/api"
	notecasev1 "notecase.dev/api/notecase/v1"
)

func main() {
	ctx := context.Background()
	address, options := notecase.FromEnvironment()
	if len(os.Args) > 1 {
		address = os.Args[1]
	}
	connection := must(notecase.Dial(address, options))
	defer connection.Close()
	agents, sessions := notecasev1.NewAgentServiceClient(connection), notecasev1.NewSessionServiceClient(connection)

	llm := &notecasev1.LlmAgent{Provider: "offline", Instruction: "You are a detective."}
	agent := must(agents.UpdateAgent(ctx, &notecasev1.UpdateAgentRequest{
		Agent:        &notecasev1.Agent{Name: "agents/detective", Kind: &notecasev1.Agent_Llm{Llm: llm}},
		AllowMissing: true, // The first time it is created, and this program can be run again.
	}))
	session := must(sessions.CreateSession(ctx, &notecasev1.CreateSessionRequest{
		Session: &notecasev1.Session{Agent: agent.Name},
	}))
	fmt.Printf("Opened %s.\n", session.Name)

	question := &notecasev1.Message{Parts: []*notecasev1.Part{{Kind: &notecasev1.Part_Text{Text: "Where do we begin?"}}}}
	run := must(notecase.Start(ctx, connection, &notecasev1.StartRun{
		Session: session.Name, Messages: []*notecasev1.Message{question},
	}))
	for text, err := range run.Text(ctx) { // A connection that breaks is made again, and the stream goes on where it was.
		fmt.Print(must(text, err))
	}

	// After sequence 0 comes the whole log.
	count, watch := 0, &notecasev1.WatchEventsRequest{Name: session.Name, AfterSequence: proto.Int64(0)}
	for _, err := range notecase.Watch(connection, watch).Events(ctx) {
		must(true, err)
		count++
	}
	fmt.Printf("\nThe log has %d events.\n", count)

	_, err := sessions.GetSession(ctx, &notecasev1.GetSessionRequest{Name: "sessions/nobody"})
	fmt.Println(notecase.AsError(err))
}

func must[T any](value T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return value
}
