//go:build !race

package netns_test

var buildFlags []string
