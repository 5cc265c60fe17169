// A tool in this process: starts a run whose agent may search, and answers its calls. With the name of a run it comes back to that
// run, which may have been waiting for a search since an earlier process ended.
//
//	go run ./tool 127.0.0.1:7420 [sessions/SESSION/runs/RUN]
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"os"

	"notecase.dev/api"
	notecasev1 "notecase.dev/api/notecase/v1"
)

func search(what string) string { return "A " + what + " was seen at the harbour." }

var declared = &notecasev1.Tool{
	Name: "search", Description: "Searches yesterday's papers.",
	Parameters:     `{"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]}`,
	Implementation: &notecasev1.Tool_Client{Client: &notecasev1.ClientTool{}},
}

func main() {
	ctx := context.Background()
	address, options := notecase.FromEnvironment()
	if len(os.Args) > 1 {
		address = os.Args[1]
	}
	connection := must(notecase.Dial(address, options))
	defer connection.Close()

	var run *notecase.Stream
	if len(os.Args) > 2 {
		run = notecase.Watch(connection, &notecasev1.WatchEventsRequest{Name: os.Args[2]})
	} else {
		llm := &notecasev1.LlmAgent{Provider: "offline"} // It calls what it is told to call.
		agent := must(notecasev1.NewAgentServiceClient(connection).UpdateAgent(ctx, &notecasev1.UpdateAgentRequest{
			Agent: &notecasev1.Agent{Name: "agents/reader", Kind: &notecasev1.Agent_Llm{Llm: llm}}, AllowMissing: true,
		}))
		ask := &notecasev1.Part{Kind: &notecasev1.Part_Text{Text: `/call search {"what": "violin"}`}}
		run = must(notecase.Start(ctx, connection, &notecasev1.StartRun{
			NewSession:  &notecasev1.Session{Agent: agent.Name},
			Messages:    []*notecasev1.Message{{Parts: []*notecasev1.Part{ask}}},
			ClientTools: []*notecasev1.Tool{declared},
		}))
	}

	begun := map[string]bool{} // A call may come twice: as pending when the stream attaches, and as an event.
	answer := func(call *notecasev1.ToolCall) {
		if call.Tool != "search" || begun[call.CallId] {
			return
		}
		begun[call.CallId] = true
		result := &notecasev1.ToolResult{CallId: call.CallId}
		var arguments struct{ What string }
		if err := json.Unmarshal([]byte(call.Arguments), &arguments); err != nil {
			result.Error = "The arguments do not fit: " + err.Error()
		} else {
			found := &notecasev1.Part{Kind: &notecasev1.Part_Text{Text: search(arguments.What)}}
			result.Result = []*notecasev1.Part{found}
		}
		command := &notecasev1.RunRequest{ // Sent twice, it takes effect once.
			CommandId: "result-" + call.CallId, Command: &notecasev1.RunRequest_ToolResult{ToolResult: result},
		}
		request := &notecasev1.SendCommandRequest{Session: run.Attached.Session, Run: run.Attached.Run.Name, Command: command}
		err := notecase.Backoff{}.Repeat(ctx, func(ctx context.Context) error {
			_, err := notecasev1.NewRunServiceClient(connection).SendCommand(ctx, request)
			return err
		})
		if err != nil && notecase.AsError(err).Reason != "CALL_NOT_PENDING" { // Another process answered first.
			log.Fatal(err)
		}
	}
	run.OnAttached = func(attached *notecasev1.Attached) {
		for _, call := range attached.GetRun().GetPendingCalls() {
			answer(call)
		}
	}
	for event, err := range run.Events(ctx) {
		if started := must(event, err).GetToolStarted(); started.GetClientExecuted() {
			answer(started)
		}
		for _, part := range event.GetMessageAdded().GetParts() {
			if event.GetMessageAdded().Role == notecasev1.Message_ROLE_ASSISTANT && part.GetText() != "" {
				fmt.Println(part.GetText())
			}
		}
	}
}

func must[T any](value T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return value
}
