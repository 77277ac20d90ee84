// Command probe is the service of the appliance under test: it keeps records on
// the data volume and shows what the tests want to see of the box.
//
//	PUT  /record/NAME   store the body; answered after it is on the medium
//	GET  /record/NAME
//	GET  /file?path=P   a file of the container
//	GET  /health
//	GET  /whoami        uid and effective capabilities
//	GET  /space         bytes of the data volume's file system
//	POST /die           end with exit status 3
//	POST /run?arg=P&arg=A...  run a program; its exit code, a line feed, what it printed
//	ANY  /v1/...        the agent's API
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

const folder = "/data"

func main() {
	http.HandleFunc("GET /health", func(w http.ResponseWriter, r *http.Request) {})
	http.HandleFunc("PUT /record/{name}", put)
	http.HandleFunc("GET /record/{name}", func(w http.ResponseWriter, r *http.Request) {
		http.ServeFile(w, r, filepath.Join(folder, filepath.Base(r.PathValue("name"))))
	})
	http.HandleFunc("GET /file", func(w http.ResponseWriter, r *http.Request) {
		b, err := os.ReadFile(r.FormValue("path"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		w.Write(b)
	})
	http.HandleFunc("GET /whoami", func(w http.ResponseWriter, r *http.Request) {
		status, err := os.ReadFile("/proc/self/status")
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		for line := range strings.Lines(string(status)) {
			if strings.HasPrefix(line, "CapEff:") || strings.HasPrefix(line, "Uid:") {
				fmt.Fprint(w, line)
			}
		}
	})
	http.HandleFunc("GET /space", func(w http.ResponseWriter, r *http.Request) {
		var st syscall.Statfs_t
		if err := syscall.Statfs(folder, &st); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		fmt.Fprint(w, int64(st.Blocks)*st.Bsize)
	})
	agent := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", "agent" },
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", "/run/holdfast/agent.sock")
		}},
	}
	http.Handle("/v1/", agent)
	http.HandleFunc("POST /die", func(w http.ResponseWriter, r *http.Request) { os.Exit(3) })
	http.HandleFunc("POST /run", run)
	log.Fatal(http.ListenAndServe(":80", nil))
}

// run is for boxes that nobody can log in to.
func run(w http.ResponseWriter, r *http.Request) {
	argv := r.URL.Query()["arg"]
	if len(argv) == 0 {
		http.Error(w, "no program", http.StatusBadRequest)
		return
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	fmt.Fprintf(w, "%d\n%s", cmd.ProcessState.ExitCode(), out)
}

// put stores a record so that it survives a power cut after the answer.
func put(w http.ResponseWriter, r *http.Request) {
	if err := store(filepath.Base(r.PathValue("name")), r.Body); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

func store(name string, body io.Reader) error {
	at := filepath.Join(folder, name)
	f, err := os.Create(at + ".new")
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(f, body); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(at+".new", at); err != nil {
		return err
	}
	d, err := os.Open(folder)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
