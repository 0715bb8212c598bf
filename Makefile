# The commands a person types. The work is in scripts/ and in Go.

export CGO_ENABLED ?= 1
GO_BUILD = CGO_ENABLED=0 go build -trimpath

.PHONY: all build test check fuzz bench demo vagrant clean

all: build

build: ## the two binaries, static, in bin/
	$(GO_BUILD) -o bin/ ./cmd/pcpd ./cmd/pcpctl

test: ## every check, as continuous integration runs it
	scripts/test.sh

check: ## the quick part: format, vet, tests without the race detector
	test -z "$$(gofmt -l .)"
	go vet ./...
	go test ./...

fuzz: ## 1,000,000 executions of each fuzz target; takes most of an hour
	scripts/fuzz.sh

bench: ## what requests and packets cost, into docs/bench.jsonl and README.md; ten minutes (PCPD_BENCH=full: to 1,000,000)
	scripts/bench.sh

demo: ## a router with pcpd and real connections through it, then all is removed
	scripts/demo.sh

vagrant: ## does the Vagrantfile hold? (installs vagrant on Debian)
	scripts/vagrant-validate.sh

clean:
	rm -rf bin build
